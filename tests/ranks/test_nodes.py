"""Runs that other machines take part in, and runs that are killed: real launchers, real signals, the same numbers."""

import collections
import contextlib
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints
from tests.ranks.launching import free_port, processes_of, two_machines, workers_of

ROOT = Path(finetune.__file__).parent
DATA = EXAMPLES / "data"
PAGE = ["bash", str(ROOT / "finetune/finetune_lora_ds.sh")]
STEPS, SAVE_STEPS = 25, 5  # long enough for every kill below to come well before the end
TRAINING = ["--max_steps", STEPS, "--save_steps", SAVE_STEPS, "--logging_steps", 1, "--learning_rate", "5e-3",
            "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--lora_r", 8]


def training_command(model, out):
    return [*PAGE, "-m", model, "-d", DATA, "-o", out, *TRAINING]


def complete(out):
    """Steps of the complete checkpoints."""
    return sorted(int(path.parent.name.split("-")[1]) for path in out.glob(f"checkpoint-*/{checkpoints.MANIFEST}"))


def numbers(out):
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    steps = [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]
    assert [step for step, *_ in steps] == list(range(1, STEPS + 1))
    return steps


def check_adapter(out):
    assert not list(out.glob("*.unfinished"))
    assert AutoTokenizer.from_pretrained(out).chat_template
    AutoPeftModelForCausalLM.from_pretrained(out)


# -- several machines -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def start_on_two_nodes(start, record_testsuite_property):
    """start_on_two_nodes(command, **environment) -> [Run of node 0, Run of node 1].

    The nodes are two network namespaces joined by a cable, as two machines would be; or, with a warning, the loopback
    of this machine where one may not make namespaces or has no iproute2 (`ip`).
    """
    with contextlib.ExitStack() as stack:
        try:
            names, where = stack.enter_context(two_machines()), "two network namespaces"
        except (OSError, subprocess.CalledProcessError) as error:
            names, where = [], f"the loopback: {(getattr(error, 'stderr', '') or str(error)).strip()}"
            warnings.warn(f"two nodes on {where}", stacklevel=1)
        record_testsuite_property("two nodes on", where)

        def run(command, **environment):
            if names:
                network = {"MASTER_ADDR": "10.213.0.1", "GLOO_SOCKET_IFNAME": "cable"}
            else:
                network = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(free_port())}
            return [start([*(["ip", "netns", "exec", names[node]] if names else []), *command], NNODES="2",
                          NODE_RANK=str(node), GPUS_PER_NODE="1", **network, **environment) for node in range(2)]

        yield run


@pytest.fixture(scope="module")
def undisturbed(start_on_two_nodes, make_model, folder):
    """A whole run on two nodes: (its folder, what node 0 printed, what node 1 printed)."""
    out = folder / "undisturbed"
    nodes = start_on_two_nodes(training_command(make_model(), out))
    return out, *[node.ends(0) for node in nodes]


def test_two_nodes_train_one_model(undisturbed):
    out, *printed = undisturbed
    lines = collections.Counter("\n".join(printed).splitlines())
    assert lines["  device              2 x cpu, ZeRO-2"] == 1
    for once in ("First sample, what is trained between [[ and ]]:", "Training:", "Done:"):
        assert lines[once] == 1
    assert re.findall(r"^step (\d+)/", "".join(printed), re.MULTILINE) == [str(step + 1) for step in range(STEPS)]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (out / f"checkpoint-{STEPS}").iterdir()}
    assert complete(out) == list(range(SAVE_STEPS, STEPS + 1, SAVE_STEPS))
    check_adapter(out)


def on_nodes(program, *arguments):
    """The command of `start_on_two_nodes` that runs another program than finetune.py."""
    launcher = shlex.join([sys.executable, str(ROOT / "mechanisms/torchrun.py")])
    machine = "--nnodes 2 --node_rank $NODE_RANK --master_addr $MASTER_ADDR --master_port ${MASTER_PORT:-6001}"
    return ["bash", "-c", f"exec {launcher} {machine} {shlex.join(map(str, [program, *arguments]))}"]


def test_a_signal_to_one_node_saves_and_ends_both(start_on_two_nodes, make_model, cache_dir, folder):
    out = folder / "signalled"
    training = [*TRAINING[2:], "--max_steps", 100_000, "--save_steps", 100_000, "--use_lora"]
    nodes = start_on_two_nodes(on_nodes(ROOT / "finetune.py", "--model_name_or_path", make_model(),
                                        "--data_path", DATA, "--output_dir", out, "--cache_dir", cache_dir, *training))
    nodes[0].wait_until(lambda: max(nodes[0].steps, default=0) >= 3)
    nodes[1].process.terminate()
    output = nodes[0].ends(143, seconds=60)
    nodes[1].ends(143, seconds=60)
    [newest] = complete(out)
    assert f"Ended by SIGTERM: checkpoint-{newest} is complete" in output and not processes_of(out)


@pytest.mark.parametrize("killed", [0, 1])
def test_nothing_stays_behind_when_the_launcher_of_one_node_is_killed(start_on_two_nodes, steps, killed):
    nodes = start_on_two_nodes(on_nodes(steps))
    for node in nodes:
        node.wait_until(lambda node=node: node.steps)
    nodes[killed].process.kill()
    other = nodes[1 - killed]
    other.process.wait(60)
    assert other.process.returncode == 1 and not processes_of(steps)
    # (torch may still print where in its C++ it was.)
    said = "^(machine 0 has gone|rank . failed first: RuntimeError)"
    assert re.search(said, other.output, re.MULTILINE), other.output


def test_one_message_where_the_data_is_bad(start, make_model, folder):
    (folder / "bad.jsonl").write_text('{"instruction": "no output"}\n')
    out = folder / "bad"
    run = start([*PAGE, "-m", make_model(), "-d", "bad.jsonl", "-o", out, "--deepspeed", "none"], GPUS_PER_NODE="2")
    run.wait_until(lambda: "error: " in run.output)
    output = run.ends(2, seconds=60)
    lines = [line for line in output.splitlines() if not re.match(r"[WE]\d{4} .*torch/distributed/elastic/", line)]
    last = next(number for number, line in enumerate(lines) if re.match(r"rank \d failed first: error: ", line))
    said = lines[lines.index("error: the data cannot be used as it is:"):last]
    assert said[1].startswith("bad.jsonl:1 ")
    assert len(said) == 4 and said[3].startswith("1 record rejected.")
    assert {re.sub(r"^rank \d failed first: ", "", line) for line in lines[last:]} <= set(said)
    assert not processes_of(out)


def test_the_rank_that_spoke_is_named_though_another_was_faster_to_exit(start, folder):
    (folder / "ranks.py").write_text(f"""
import atexit, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from mechanisms.errors import UserError, user_errors_end_the_program
if os.environ["RANK"] == "1":
    while not os.path.exists(os.path.dirname(os.environ["TORCHELASTIC_ERROR_FILE"]) + "/../failed"):
        time.sleep(0.01)
else:
    atexit.register(time.sleep, 3600)
with user_errors_end_the_program():
    raise UserError("it is Sunday")
""")
    run = start([sys.executable, ROOT / "mechanisms/torchrun.py", "--nproc_per_node", 2, folder / "ranks.py"])
    output = run.ends(2)
    assert output.splitlines()[-1] == "rank 0 failed first: error: it is Sunday"
    assert output.splitlines().count("error: it is Sunday") == 1


# -- killed -----------------------------------------------------------------------------------------------------------

def test_ranks_that_are_killed_change_no_number(start, start_on_two_nodes, undisturbed, make_model, folder):
    """A rank is killed, the launcher starts again; it is killed again, the run ends; the same command on two machines
    resumes, a rank is killed there, the launchers start again on both: the numbers of a run that met nothing of it."""
    out = folder / "out"
    command = training_command(make_model(), out)
    run = start(command, GPUS_PER_NODE="2", MAX_RESTARTS="1")
    run.wait_until(lambda: 5 in complete(out))
    workers_of(run)[1].kill()
    run.wait_until(lambda: "starting again, 1 of 1 times" in run.output)
    said = r"^rank 1 failed first: killed by SIGKILL.*\nstarting again, 1 of 1 times$"
    assert re.search(said, run.output, re.MULTILINE)
    before = complete(out)[-1]
    run.wait_until(lambda: complete(out)[-1] > before)
    assert re.search(rf"^Resuming from {re.escape(str(out))}/checkpoint-\d+$", run.output, re.MULTILINE)
    workers_of(run)[1].kill()
    output = run.ends(128 + signal.SIGKILL, seconds=60)
    assert output.splitlines()[-1].startswith("rank 1 failed first: killed by SIGKILL")
    assert "ChildFailedError" not in output and "Root Cause" not in output
    assert not processes_of(out)

    newest = complete(out)[-1]
    nodes = start_on_two_nodes(command, MAX_RESTARTS="1")
    nodes[0].wait_until(lambda: complete(out)[-1] > newest)
    workers_of(nodes[1])[1].kill()
    output = nodes[0].ends(0)
    nodes[1].ends(0)
    first, second = re.findall(r"^Resuming from .*checkpoint-(\d+)$", output, re.MULTILINE)
    assert int(first) == newest and int(second) > newest and output.count("Done:") == 1
    assert not processes_of(out)
    assert numbers(out) == numbers(undisturbed[0])
    check_adapter(out)


def test_one_process_killed_and_interrupted(start, make_model, cache_dir, folder):
    out = {name: folder / f"one process, {name}" for name in ("undisturbed", "killed", "interrupted")}
    command = {name: [sys.executable, ROOT / "finetune.py", "--model_name_or_path", make_model(), "--data_path", DATA,
                      "--output_dir", path, "--cache_dir", cache_dir, "--use_lora", *TRAINING]
               for name, path in out.items()}

    def send(run, name, number):
        moment = random.randint(SAVE_STEPS, STEPS // 2)
        run.wait_until(lambda: complete(out[name]) and max(run.steps, default=0) >= moment)
        time.sleep(random.random() / 10)  # anywhere in a step or in the writing of a checkpoint
        run.process.send_signal(number)

    killed, interrupted = start(command["killed"]), start(command["interrupted"])
    with ThreadPoolExecutor() as both:
        list(both.map(send, (killed, interrupted), ("killed", "interrupted"), (signal.SIGKILL, signal.SIGINT)))
    killed.ends(-signal.SIGKILL)
    output = interrupted.ends(130, seconds=60)
    newest = complete(out["interrupted"])[-1]
    assert output.splitlines()[-1].startswith(f"Ended by SIGINT: checkpoint-{newest} is complete")
    assert "Traceback" not in output
    for name in ("killed", "interrupted"):
        for step in complete(out[name]):
            assert not isinstance(checkpoints.read_manifest(out[name] / f"checkpoint-{step}"), str)

    newest = complete(out["killed"])[-1]
    again, undisturbed = start(command["killed"]), start(command["undisturbed"])
    assert f"Resuming from {out['killed'] / f'checkpoint-{newest}'}" in again.ends(0)
    undisturbed.ends(0)
    assert numbers(out["killed"]) == numbers(out["undisturbed"])
    check_adapter(out["killed"])
