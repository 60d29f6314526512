"""Signals to a launcher, to all processes, to one rank: work is saved, nothing stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import TrainerControl, TrainerState

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints, signals, stopping
from tests.ranks.launching import processes_of, workers_of

ROOT = Path(finetune.__file__).parent
PROGRAM = ROOT / "finetune.py"
LAUNCHER = [sys.executable, ROOT / "mechanisms/torchrun.py", "--nproc_per_node"]
STEPS = 60


@pytest.fixture(scope="module")
def arguments(make_model, cache_dir):
    def arguments(out, steps=STEPS):
        return ["--model_name_or_path", make_model(), "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir,
                "--output_dir", out, "--use_lora", "--lora_r", 8, "--max_steps", steps, "--save_steps", 10_000,
                "--logging_steps", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
                "--learning_rate", "5e-3", "--dataloader_num_workers", 1]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(start, arguments, folder):
    out = folder / "undisturbed"
    start([*LAUNCHER, 2, PROGRAM, *arguments(out)]).ends(0)
    return numbers(out)


def numbers(out):
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def complete(out):
    """Steps of the complete checkpoints."""
    return sorted(int(path.parent.name.split("-")[1]) for path in out.glob(f"checkpoint-*/{checkpoints.MANIFEST}"))


def all_processes(run):
    launcher = psutil.Process(run.process.pid)
    return [launcher, *launcher.children(recursive=True)]


def gone(processes, seconds=10):
    return not [process for process in psutil.wait_procs(processes, seconds)[1]
                if process.status() != psutil.STATUS_ZOMBIE]


def in_step(run, step):
    run.wait_until(lambda: max(run.steps, default=0) >= step)


def test_requests_are_saved_and_change_no_number(start, arguments, undisturbed, folder):
    """Saved on request and stopped in every way, and each time the same command: one run, to the last digit."""
    out = folder / "asked"
    command = [*LAUNCHER, 2, PROGRAM, *arguments(out)]

    run = start(command)
    in_step(run, 3)
    workers_of(run)[1].send_signal(signal.SIGUSR1)
    run.wait_until(lambda: len(complete(out)) == 1)
    step = max(run.steps)
    (out / stopping.SAVE_NOW).touch()
    run.wait_until(lambda: not (out / stopping.SAVE_NOW).exists())
    assert len(complete(out)) == 2 and complete(out)[-1] > step
    in_step(run, complete(out)[-1] + 2)
    for process in all_processes(run):  # as a scheduler does it: the launcher, the ranks, their data loaders
        process.send_signal(signal.SIGUSR2)
    output = run.ends(0, seconds=60)
    assert len(complete(out)) == 3 and output.count("Saved as asked: checkpoint-") == 2 and "Done:" not in output
    newest = complete(out)[-1]
    assert output.splitlines()[-1] == f"Ended by SIGUSR2: checkpoint-{newest} is complete, the same command resumes"
    assert newest < STEPS and not processes_of(out)

    ways = ((signal.SIGTERM, 143, lambda run: all_processes(run)), (signal.SIGINT, 130, lambda run: [run.process]),
            (signal.SIGTERM, 143, lambda run: [workers_of(run)[0]]))
    for number, code, receivers in ways:
        run = start(command)
        in_step(run, newest + 2)
        for process in receivers(run):
            process.send_signal(number)
        output = run.ends(code, seconds=60)
        assert f"from {out / f'checkpoint-{newest}'}\n" in output and "Traceback" not in output
        newest = complete(out)[-1]
        assert output.splitlines()[-1].startswith(f"Ended by {number.name}: checkpoint-{newest} is complete")
        assert "failed first" not in output and not processes_of(out)

    assert newest < STEPS
    start(command).ends(0)
    assert numbers(out) == undisturbed


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(start, steps, number, code):
    """One rank is stopped, so that the first signal is never answered."""
    run = start([*LAUNCHER, 2, steps])
    run.wait_until(lambda: len(run.steps) == 2)
    processes = all_processes(run)
    workers_of(run)[0].suspend()
    run.process.send_signal(number)
    run.wait_until(lambda: f"{number.name}: the ranks end; once more ends them at once" in run.output)
    time.sleep(1)
    assert run.process.poll() is None
    run.process.send_signal(number)
    run.ends(code, seconds=10)
    assert gone(processes)


def test_ranks_that_do_not_end_are_killed_after_the_grace_period(start, steps):
    run = start([*LAUNCHER, 2, "--grace_period", 2, steps])
    run.wait_until(lambda: len(run.steps) == 2)
    processes = all_processes(run)
    run.process.terminate()
    output = run.ends(143, seconds=30)
    assert output.splitlines()[-1] == "the ranks did not end within --grace_period 2 s: killed" and gone(processes)


def test_one_process(start, arguments, folder):
    out = folder / "alone"
    command = [sys.executable, PROGRAM, *arguments(out, 100_000)]
    run = start(command)
    in_step(run, 2)
    os.killpg(run.process.pid, signal.SIGINT)  # Ctrl-C: the data loader gets it too
    output = run.ends(130, seconds=60)
    newest = complete(out)[-1]
    assert "SIGINT: a checkpoint is saved after this step; once more ends the program at once" in output
    assert output.splitlines()[-1].startswith(f"Ended by SIGINT: checkpoint-{newest} is complete")
    assert "Traceback" not in output and not processes_of(out)

    run = start(command)
    in_step(run, newest + 2)
    processes = all_processes(run)
    for process in processes[1:]:
        process.suspend()  # the data loader stands still: the step does not end
    time.sleep(2)
    for _ in range(2):
        run.process.terminate()
        time.sleep(1)
    output = run.ends(143, seconds=10)
    assert output.splitlines()[-1] == "ended by SIGTERM" and gone(processes) and complete(out) == [newest]


def test_output_that_nobody_reads_any_more_is_no_reason_not_to_save(start, arguments, folder):
    """`... 2>&1 | tee log`, and Ctrl-C ends the tee as well."""
    out = folder / "unread"
    reader, writer = os.pipe()
    words = map(str, [*LAUNCHER, 2, PROGRAM, *arguments(out, 100_000), "--logging_steps", 100_000,
                      "--logging_first_step"])
    run = subprocess.Popen(list(words), stdout=writer, stderr=writer, start_new_session=True, cwd=folder)
    os.close(writer)
    with open(reader, encoding="utf-8") as output:
        next(line for line in output if line.startswith("step 1/"))
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) == 130 and len(complete(out)) == 1 and not processes_of(out)


@pytest.mark.parametrize("receiver, number, code, line", [
    ("launcher", signal.SIGTERM, 143, "ended by SIGTERM"),
    ("rank", signal.SIGINT, 130, "interrupted: the same command resumes"),
    ("all", signal.SIGUSR2, 0, "ended by SIGUSR2"),
])
def test_before_the_first_step_a_signal_ends_at_once(start, folder, receiver, number, code, line):
    """Also ranks whose main thread waits for another in a library. SIGUSR1 is no reason to end."""
    program = folder / "waiting.py"
    program.write_text(f"""
import sys, os
sys.path.insert(0, {str(ROOT)!r})
from mechanisms import signals
signals.install()
import time, torch
torch.distributed.init_process_group("gloo")
print("here", flush=True)
if os.environ["RANK"] == "0":
    time.sleep(3600)
torch.distributed.barrier()
""")
    run = start([*LAUNCHER, 2, "--max_restarts", 3, program])
    run.wait_until(lambda: run.output.count("here") == 2)
    processes = all_processes(run)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    chosen = {"launcher": [processes[0]], "rank": [workers_of(run)[1]], "all": processes}[receiver]
    for process in chosen:
        process.send_signal(number)
    output = run.ends(code, seconds=10)
    assert output.count(line) == 1 and "failed first" not in output and "starting again" not in output
    assert gone(processes)


def test_a_signal_while_the_ranks_start_is_not_lost(start, folder):
    """Before the program has said what to do with it SIGUSR1 would kill a rank."""
    program = folder / "slow.py"
    program.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
print("here", flush=True)
time.sleep(3)
from mechanisms import signals
signals.install()
time.sleep(0.5)
print(signals.requests.take())
""")
    run = start([*LAUNCHER, 2, program])
    run.wait_until(lambda: run.output.count("here") == 2)
    run.process.send_signal(signal.SIGUSR1)
    assert run.ends(0).split() == ["here", "here", "1", "1"]


@pytest.mark.parametrize("moment", ["training", "tokenizing"])
def test_all_end_with_a_launcher_that_is_killed(start, arguments, folder, moment):
    out = folder / f"killed while {moment}"
    if moment == "training":
        run = start([*LAUNCHER, 2, PROGRAM, *arguments(out, 100_000)])
        in_step(run, 2)
        many = 5
    else:
        program = folder / "tokenizing.py"
        program.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mechanisms import signals
signals.install()
from mechanisms.data.cores import on_all_cores
for item in on_all_cores(lambda item: time.sleep(0.1), range(10_000)):
    print("done", flush=True)
""")
        run = start([*LAUNCHER, 2, program])
        run.wait_until(lambda: run.output.count("done") > 10)
        many = 3 + 2 * len(os.sched_getaffinity(0))
    processes = all_processes(run)
    assert len(processes) == many
    run.process.kill()
    assert gone(processes, seconds=5)


def test_a_rank_that_hangs_is_named(start, arguments, folder):
    out = folder / "hangs"
    run = start([*LAUNCHER, 2, PROGRAM, *arguments(out, 100_000), "--ddp_timeout", 8])
    in_step(run, 2)
    processes = all_processes(run)
    workers_of(run)[0].suspend()
    output = run.ends(1, seconds=60)
    first, last = output.splitlines()[-2:]
    assert re.match(r"rank 1 failed first: RuntimeError: .*Timed out waiting 8000ms", first)
    assert last == "rank 0 hung, stopped by a signal: the others waited for it as --ddp_timeout says"
    assert gone(processes)


@pytest.mark.parametrize("pieces, code", [([1] * 5, 0), ([1, 3600], 1)])
def test_work_that_goes_on_is_waited_for(start, folder, pieces, code):
    """The first rank takes longer than --ddp_timeout before the others may enter; only a piece of work may not."""
    program = folder / "working.py"
    program.write_text(f"""
import sys, time
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from mechanisms import strategies
from mechanisms.errors import user_errors_end_the_program
with user_errors_end_the_program():
    strategies.prepare_ranks(["--ddp_timeout", "3"])
    import os, torch
    rank = int(os.environ["RANK"])
    args = SimpleNamespace(world_size=3, local_process_index=rank, device="cpu")
    with strategies.first_before_others(args) as at_work:
        for piece in {pieces} if rank == 0 else []:
            time.sleep(piece)
            at_work()
        print("rank", rank, flush=True)
    torch.distributed.barrier()
""")
    output = start([*LAUNCHER, 3, program]).ends(code, seconds=100)
    if code:
        assert output.splitlines()[-1] == "rank 0 hung: the others waited for it as --ddp_timeout says"
        assert "Timed out waiting 3000ms" in output and "rank 1\n" not in output
    else:
        ranks = re.findall("^rank (.)", output, re.MULTILINE)
        assert ranks[0] == "0" and len(ranks) == 3


def test_a_rank_that_sleeps_for_ever_is_named(start, folder):
    program = folder / "asleep.py"
    program.write_text(f"""
import datetime, os, sys, time, torch
sys.path.insert(0, {str(ROOT)!r})
from mechanisms.errors import user_errors_end_the_program
with user_errors_end_the_program():
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=5))
    if os.environ["RANK"] == "2":
        time.sleep(3600)
    torch.distributed.barrier()
""")
    run = start([*LAUNCHER, 3, program])
    output = run.ends(1, seconds=100)
    assert output.splitlines()[-1] == "rank 2 hung: the others waited for it as --ddp_timeout says"


# -- the parts --------------------------------------------------------------------------------------------------------

def arguments_of_trainer(out, **changed):
    return SimpleNamespace(**{"world_size": 1, "output_dir": str(out), "eval_strategy": "no", "save_strategy": "steps",
                              **changed})


@pytest.mark.parametrize("changed, at_the_end", [({}, True), ({"eval_strategy": "epoch"}, False),
                                                 ({"save_strategy": "epoch"}, False)])
def test_what_an_epoch_ends_with_comes_before_the_checkpoint(tmp_path, changed, at_the_end):
    (tmp_path / stopping.SAVE_NOW).touch()
    args = arguments_of_trainer(tmp_path, **changed)
    callback = stopping.SaveOnRequest()
    for epoch, expected in ((0.5, True), (1.0, at_the_end)):
        control = TrainerControl()
        callback.on_step_end(args, TrainerState(epoch=epoch), control)
        assert control.should_save == expected
    control = TrainerControl()
    callback.on_epoch_end(args, TrainerState(epoch=1.0), control)
    assert control.should_save


def test_a_checkpoint_that_is_not_complete_is_no_success(tmp_path, capsys, monkeypatch):
    requests = signals.Requests()
    monkeypatch.setattr(stopping, "requests", requests)
    requests.keep()
    requests._come(signals.SAVE_AND_END)
    callback, state = stopping.SaveOnRequest(), TrainerState(global_step=7, epoch=0.5)
    callback.on_step_end(arguments_of_trainer(tmp_path), state, TrainerControl())
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(SystemExit) as end:
        callback.on_save(arguments_of_trainer(tmp_path), state, TrainerControl())
    assert end.value.code == 1 and "checkpoint-7 is not complete" in capsys.readouterr().out


def test_the_strongest_request_counts():
    requests = signals.Requests()
    requests.keep()
    for request in (signals.SAVE, 143, signals.SAVE_AND_END):
        requests._come(request)
    assert requests.take() == 143 and requests.take() == 0
