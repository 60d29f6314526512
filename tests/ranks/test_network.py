"""Who else can reach a run: what its processes listen on, and what comes of storing pickles with them."""

import json
import pickle
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import psutil
import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from tests.ranks.launching import free_port, two_machines, workers_of

ROOT = Path(finetune.__file__).parent
PAGE = ["bash", str(ROOT / "finetune/finetune_lora_ds.sh")]
STRATEGIES = {"DDP": ["--deepspeed", "none"], "ZeRO-2": []}

# In a process of its own, for it to run in another namespace: what answers at an address.
SCAN = """
import socket, sys
from concurrent.futures import ThreadPoolExecutor
def answers(port):
    with socket.socket() as connection:
        connection.settimeout(5)
        return connection.connect_ex((sys.argv[1], port)) == 0
with ThreadPoolExecutor(64) as many:
    print(*[port for port, found in enumerate(many.map(answers, range(1, 65536)), 1) if found])
"""
# With the store at an address, if that is one: a pickle under every key, or under those of a rendezvous.
ATTACK = """
import datetime, sys
from torch.distributed import TCPStore
host, port, pickled, everything = sys.argv[1:]
try:
    store = TCPStore(host, int(port), wait_for_workers=False, timeout=datetime.timedelta(seconds=5))
    keys = store.list_keys()
except RuntimeError as error:
    sys.exit(f"no store: {error}")
keys = [key for key in keys if everything == "True" or "rendezvous" in key] + ["torch.rendezvous.none"]
for key in keys:
    store.set(key, pickled)
print(*keys)
"""


def listening(launcher, alone=False):
    """{(address, port)} of the launcher and, unless it is wanted alone, of all that it has started."""
    found = set()
    try:
        root = psutil.Process(launcher.process.pid)
        for process in [root, *([] if alone else root.children(recursive=True))]:
            found |= {tuple(each.laddr) for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        pass  # it ends
    return found


def command(model, out, strategy="DDP", steps=30):
    return [*PAGE, "-m", model, "-d", EXAMPLES / "data", "-o", out, "--max_steps", steps, "--lora_r", 8,
            "--gradient_accumulation_steps", 1, *STRATEGIES[strategy]]


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def attack(tmp_path):
    """attack(host, port, everything=False, prefix=[]) -> the keys overwritten; attack.worked() says if code has run."""
    marker = tmp_path / "code has run"
    pickled = b64encode(pickle.dumps(Bomb(marker))).decode()

    def run(host, port, everything=False, prefix=()):
        done = subprocess.run([*prefix, sys.executable, "-c", ATTACK, host, str(port), pickled, str(everything)],
                              capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    run.worked = marker.exists
    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_machine_listens_on_the_loopback_only(start, make_model, folder, strategy):
    """From the start of the launcher to its end, with ranks that die and are started again."""
    run = start(command(make_model(), folder / f"quiet {strategy}", strategy), GPUS_PER_NODE="2", MAX_RESTARTS="1",
                MASTER_ADDR="0.0.0.0", MASTER_PORT=str(free_port()))
    found, at_rendezvous, restarted = set(), None, False
    while run.process.poll() is None:
        found |= listening(run)
        if found and at_rendezvous is None:
            at_rendezvous = set(found)
        if not restarted and max(run.steps, default=0) > 5:
            workers_of(run)[1].kill()
            restarted = True
        time.sleep(0.01)
    run.ends(0)
    assert restarted and run.output.count("starting again") == 1
    assert at_rendezvous and found > at_rendezvous  # the store before there are ranks, then the ranks themselves
    assert {address for address, _ in found} == {"127.0.0.1"}


def test_other_machines_reach_nothing(start, make_model, folder):
    out = folder / "out of reach"
    try:
        with two_machines() as (here, elsewhere):
            run = start(["ip", "netns", "exec", here, *command(make_model(), out, steps=100_000)], GPUS_PER_NODE="2")
            control = start(["ip", "netns", "exec", here, sys.executable, "-c",
                             "import socket, time; s = socket.create_server(('', 4000)); time.sleep(3600)"])
            found = []

            def scan(where, address):
                return subprocess.run(["ip", "netns", "exec", where, sys.executable, "-c", SCAN, address],
                                      capture_output=True, text=True, check=True).stdout.split()

            while len(run.steps) < 3 or len(found) < 3:  # from the rendezvous on
                found.append(scan(elsewhere, "10.213.0.1"))
                assert run.process.poll() is None, run.output
            assert len(scan(here, "127.0.0.1")) > 3  # what there was to reach: the stores and the ranks
            for process in (run.process, control.process):
                process.kill()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {(getattr(error, 'stderr', '') or str(error)).strip()}")
    assert {tuple(ports) for ports in found} == {("4000",)}


def test_pickles_in_the_stores_of_one_machine_do_not_run(start, make_model, folder, attack):
    """A store under whose keys the launcher would find pickles: it unpickled them, within 15 s."""
    run = start(command(make_model(), folder / "attacked", steps=100_000), GPUS_PER_NODE="2", MAX_RESTARTS="1")
    run.wait_until(lambda: run.steps)
    stores = [port for _, port in listening(run, alone=True) if attack("127.0.0.1", port)]
    assert stores  # there is something to attack
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for port in stores:
            attack("127.0.0.1", port, everything=True)
        assert not attack.worked()
    step = max(run.steps)
    run.wait_until(lambda: max(run.steps) > step)  # nor did it hurt
    workers_of(run)[1].kill()  # the launchers meet again
    run.wait_until(lambda: run.output.count("First sample") == 2)
    assert not attack.worked()
    run.process.kill()


def test_pickles_in_the_stores_of_several_machines_do_not_run(start, make_model, folder, attack):
    out = folder / "attacked from elsewhere"
    try:
        with two_machines() as names:
            nodes = [start(["ip", "netns", "exec", name, *command(make_model(), out, steps=100_000)], NNODES="2",
                           NODE_RANK=str(number), GPUS_PER_NODE="1", MAX_RESTARTS="1", MASTER_ADDR="10.213.0.1",
                           GLOO_SOCKET_IFNAME="cable", RDZV_ID="75cb") for number, name in enumerate(names)]
            nodes[0].wait_until(lambda: nodes[0].steps)
            elsewhere = ["ip", "netns", "exec", names[1]]
            keys = attack("10.213.0.1", 6001, everything=True, prefix=elsewhere)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and all(node.process.poll() is None for node in nodes):
                attack("10.213.0.1", 6001, everything=True, prefix=elsewhere)
            assert not attack.worked()
            assert any("75cb" in key for key in keys)  # there is something to attack
            for node in nodes:
                node.process.kill()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {(getattr(error, 'stderr', '') or str(error)).strip()}")


def test_ranks_of_another_launcher_stay_on_the_loopback(tmp_path):
    """As deepspeed's launcher starts them, and as one process under DeepSpeed starts."""
    (tmp_path / "rank.py").write_text(f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import psutil, torch
from mechanisms.torchrun import stay_on_the_loopback
stay_on_the_loopback()
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()
print(json.dumps([each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
""")
    for ranks in (1, 2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        processes = [subprocess.Popen(
            [sys.executable, tmp_path / "rank.py"], stdout=subprocess.PIPE, text=True,
            env={"PATH": "/usr/bin:/bin", **environment, "RANK": str(rank)}) for rank in range(ranks)]
        addresses = [address for process in processes for address in json.loads(process.communicate(timeout=100)[0])]
        assert addresses and set(addresses) == {"127.0.0.1"}
