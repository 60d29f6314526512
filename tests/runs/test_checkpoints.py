"""Checkpoints: whole by proof or not resumed, rotation, branches, full disks, damaged manifests, one run per folder."""

import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints, lock
from mechanisms import trainer as trainer_module
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line

FLAGS = ["--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4",
         "--learning_rate", "1e-2", "--use_lora", "--lora_r", "4"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def train(make_model, cache_dir, out):
    def run(*flags):
        return finetune.train(prepare_command_line(finetune.__file__, [
            "--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--cache_dir",
            str(cache_dir), "--output_dir", str(out), *FLAGS, *map(str, flags)]))

    return run


@pytest.fixture(scope="module")
def finished(make_model, cache_dir, tmp_path_factory):
    """The folder of a whole run; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    finetune.train(prepare_command_line(finetune.__file__, [
        "--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--cache_dir",
        str(cache_dir), "--output_dir", str(folder), *FLAGS]))
    return folder


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def same_end(out, finished):
    """Weights bit by bit and the whole log, but for times, memory and marks, are those of the undisturbed run."""
    of_this_run = "memory", "seconds_left", "resumed", "saved"
    assert (out / "adapter_model.safetensors").read_bytes() == (finished / "adapter_model.safetensors").read_bytes()
    logs = [[{name: value for name, value in entry.items() if "_second" not in name and "runtime" not in name
              and name not in of_this_run}
             for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
            for folder in (out, finished)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


# Damage to a checkpoint ----------------------------------------------------------------------------------------------

DAMAGE = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
          "emptied": lambda path: path.write_bytes(b""),
          "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
          "one bit flipped": flip, "missing": lambda path: path.unlink(),
          "a folder": lambda path: (path.unlink(), path.mkdir()),
          "a pipe": lambda path: (path.unlink(), os.mkfifo(path))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_to_any_file_is_resumed_from(finished, tmp_path, damage):
    files = [path.name for path in (finished / "checkpoint-6").iterdir()]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            checkpoints.MANIFEST} <= set(files) and "training_args.bin" not in files
    for name in files:
        out = tmp_path / name
        shutil.copytree(finished, out)
        DAMAGE[damage](out / "checkpoint-6" / name)
        for verify in ("full", "sizes"):  # all files here are small
            found, notices = checkpoints.checkpoint_to_resume(str(out), None, verify)
            assert found == str(out / "checkpoint-4"), name
            assert len(notices) == 1 and "checkpoint-6 is skipped: " in notices[0]
            assert name in notices[0] and "\n" not in notices[0]


def test_sizes_alone_are_verified_where_that_is_asked_for(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(checkpoints, "SMALL", 1 << 10)
    flip(tmp_path / "out/checkpoint-6/optimizer.pt", 5000)
    newest = [checkpoints.checkpoint_to_resume(str(tmp_path / "out"), None, verify)[0] for verify in ("full", "sizes")]
    assert [path[-1] for path in newest] == ["4", "6"]
    flip(tmp_path / "out/checkpoint-6/scheduler.pt", 0)
    monkeypatch.setattr(checkpoints, "SMALL", 1 << 11)
    assert checkpoints.checkpoint_to_resume(str(tmp_path / "out"), None, "sizes")[0][-1] == "4"


def test_weights_that_are_not_finite_are_not_resumed_from_though_every_digest_holds(finished, tmp_path):
    folder = tmp_path / "out/checkpoint-6"
    shutil.copytree(finished, tmp_path / "out")
    run = checkpoints.read_manifest(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / "adapter_model.safetensors")
    checkpoints.write_manifest(folder, run)
    assert checkpoints.read_manifest(folder) == "adapter_model.safetensors holds numbers that are not finite"


def hostile_manifests(manifest):
    """{name: bytes of a manifest}: none is good, and those that are JSON objects have the right digest."""
    def changed(**fields):
        new = {name: value for name, value in {**manifest, **fields}.items() if value is not ...}
        new.pop("digest", None)
        return json.dumps({**new, "digest": checkpoints.digest_of_json(new)}).encode()

    files, run = manifest["files"], manifest["run"]
    file = next(iter(files.values()))
    as_text = json.dumps(manifest).encode()
    return {
        "empty": b"", "zeros": bytes(500), "not JSON": b"{", "half": as_text[:len(as_text) // 2], "null": b"null",
        "a number": b"7", "a text": b'"x"', "a list": b"[]", "an empty object": b"{}", "not UTF-8": b'{"run": "\xff"}',
        "UTF-16": as_text.decode().encode("utf-16"), "nested": b"[" * 100_000, "an int of 5000 digits": b"9" * 5000,
        "no digest": json.dumps({name: value for name, value in manifest.items() if name != "digest"}).encode(),
        "digest a list": json.dumps({**manifest, "digest": [manifest["digest"]]}).encode(),
        "another seed": as_text.replace(b'"seed": 42', b'"seed": 43'),
        "no run": changed(run=...), "run empty": changed(run={}), "run a list": changed(run=[]),
        "run null": changed(run=None), "steps a text": changed(run={**run, "steps": "6"}),
        "no files": changed(files=...),
        "files empty": changed(files={}), "files a list": changed(files=list(files)),
        "files of main": changed(files={name: value["bytes"] for name, value in files.items()}),
        "size a text": changed(files={**files, "config.json": {**file, "bytes": "1"}}),
        "size negative": changed(files={**files, "README.md": {**file, "bytes": -1}}),
        "digest of a file null": changed(files={**files, "README.md": {**file, "digest": None}}),
        "path above": changed(files={**files, "../checkpoint-4/README.md": file}),
        "path absolute": changed(files={**files, "/etc/passwd": file}),
        "path empty": changed(files={**files, "": file}),
        "path with a zero": changed(files={**files, "a\0b": file}),
        "path long": changed(files={**files, "x" * 5000: file}),
        "path a surrogate": changed(files={**files, "\ud800": file}),
        "step of another": changed(step=4), "step a text": changed(step="6"), "ranks a list": changed(ranks=[1]),
        "resumable null": changed(resumable=None), "one field more": changed(more=1)}


def test_no_form_of_manifest_is_a_traceback(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out/checkpoint-6" / checkpoints.MANIFEST
    manifest = json.loads(path.read_text())
    forms = hostile_manifests({name: value for name, value in manifest.items() if name != "digest"}
                              | {"digest": manifest["digest"]})
    assert len(forms) >= 30
    for name, content in forms.items():
        path.write_bytes(content)
        found, notices = checkpoints.checkpoint_to_resume(str(tmp_path / "out"), None)
        assert found == str(tmp_path / "out/checkpoint-4"), name
        assert len(notices) == 1 and "\n" not in notices[0] and len(notices[0]) < 6000, name
    path.unlink()
    path.symlink_to(path)
    assert checkpoints.checkpoint_to_resume(str(tmp_path / "out"), None)[0] == str(tmp_path / "out/checkpoint-4")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    path.unlink()
    path.symlink_to(tmp_path / "huge")
    assert checkpoints.checkpoint_to_resume(str(tmp_path / "out"), None)[0] == str(tmp_path / "out/checkpoint-4")


# Writing -------------------------------------------------------------------------------------------------------------

def test_everything_is_on_the_disk_before_the_manifest_and_it_goes_before_a_rewrite(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-3"
    (folder / "sub").mkdir(parents=True)
    events, flush, replace = [], checkpoints.flush, os.replace
    monkeypatch.setattr(checkpoints, "flush",
                        lambda path: (events.append(os.path.relpath(path, tmp_path)), flush(path)))
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("manifest"), replace(*args)))
    for name in ("weights", "sub/part"):
        (folder / name).write_text(name)
    checkpoints.write_manifest(folder, {"steps": 3})
    last = events.index("manifest")
    assert set(events[:last]) == {"checkpoint-3/weights", "checkpoint-3/sub/part", "checkpoint-3/sub", "checkpoint-3",
                                  "."}
    assert events[last + 1:] == ["checkpoint-3"]
    assert checkpoints.read_manifest(folder) == {"steps": 3}
    (folder / "weights").write_text("other")
    monkeypatch.setattr(checkpoints, "settle", lambda folder: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError):
        checkpoints.write_manifest(folder, {"steps": 3})
    assert checkpoints.read_manifest(folder) == "no complete.json: it was not written to the end"


def test_files_have_the_mode_of_the_umask_and_none_is_a_pickle_of_the_arguments(train, out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    before = os.umask(0o027)
    try:
        train("--max_steps", 2)
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert not [path for path in files if b"secretsecret" in path.read_bytes() or path.name == "training_args.bin"]
    assert not (out / lock.LOCK).exists()


def test_rotation_counts_complete_checkpoints_alone(train, out, finished, capsys):
    shutil.copytree(finished, out)
    (out / "adapter_config.json").unlink()
    DAMAGE["truncated"](out / "checkpoint-6/optimizer.pt")
    shutil.rmtree(out / "checkpoint-4")
    train("--save_total_limit", 1)
    assert names(out) == ["checkpoint-6"] and names(out / "abandoned") == ["checkpoint-6"]
    said = capsys.readouterr().out
    assert "checkpoint-6 is skipped: optimizer.pt has" in said
    assert f"{out}/checkpoint-6 is moved to {out}/abandoned/checkpoint-6: not complete" in said
    same_end(out, finished)


def test_a_branch_leaves_the_other_ones_checkpoints_behind(train, out, finished, capsys):
    shutil.copytree(finished, out)
    train("--resume_from_checkpoint", out / "checkpoint-2", "--save_total_limit", 2, "--max_steps", 6)
    assert names(out) == ["checkpoint-4", "checkpoint-6"]
    assert names(out / "abandoned") == ["checkpoint-4", "checkpoint-6"]
    assert "ahead of step 2, from where this run resumes" in capsys.readouterr().out
    same_end(out, finished)
    train("--resume_from_checkpoint", out / "checkpoint-4")
    assert names(out / "abandoned") == ["checkpoint-4", "checkpoint-6", "checkpoint-6.2"]


def test_a_save_that_fails_leaves_the_older_checkpoint_and_the_run_goes_on(train, out, finished, monkeypatch, capsys):
    def disk_full(obj, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file "
                               "data/3: file write failed")
        return save(obj, path, *args, **kwargs)

    save = torch.save
    monkeypatch.setattr(torch, "save", disk_full)
    train("--save_total_limit", 1)
    [line] = [line for line in capsys.readouterr().out.split("\n") if "is not saved" in line]
    assert "checkpoint-4 is not saved: " in line and "the newest complete one is checkpoint-2. Training goes on" in line
    assert names(out) == ["checkpoint-6"]
    same_end(out, finished)


def test_a_result_that_cannot_be_saved_ends_the_run_and_the_same_command_saves_it(train, out, finished, monkeypatch):
    replace = os.replace

    def full(source, target):
        if "result.unfinished" in str(source) and "README" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="the result is not saved to .*: No space left on device. The same command"):
        train()
    assert not (out / "adapter_config.json").exists()
    monkeypatch.undo()
    train()
    same_end(out, finished)


def test_room_on_the_disk_is_looked_for_at_the_start_and_before_each_save(train, out, monkeypatch, capsys):
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"too full to begin: about .* GB are needed in .* a checkpoint takes .* GB"):
        train()
    monkeypatch.undo()

    make, looked = trainer_module.SafeTrainer._make_room, []

    def make_room(self, folder):
        looked.append(os.path.basename(folder))
        if "checkpoint-4" in folder:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        try:
            make(self, folder)
        finally:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    monkeypatch.setattr(trainer_module.SafeTrainer, "_make_room", make_room)
    train()
    assert looked == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and names(out) == ["checkpoint-2", "checkpoint-6"]
    assert "(it holds checkpoint-2: " in capsys.readouterr().out


# The folder ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, message", [
    ("file", "cannot be written to: File exists"), ("link", r"\(a link to nowhere\) cannot be written to"),
    ("below a file", "cannot be written to: Not a directory"), ("system", "cannot be written to: ")])
def test_a_folder_that_cannot_be_written_to_is_one_line_before_the_data_is_read(train, out, kind, message, capsys):
    where = {"below a file": out / "deeper", "system": "/proc/out"}.get(kind, out)
    if kind in ("file", "below a file"):
        out.write_text("")
    elif kind == "link":
        out.symlink_to(out.parent / "nowhere")
    with pytest.raises(UserError, match=message) as error:
        train("--output_dir", where)
    assert "\n" not in str(error.value) and "Data (train)" not in capsys.readouterr().out


HOLD = "import sys, time; from mechanisms.lock import only_run_in\nwith only_run_in(sys.argv[1]):\n" \
       "    print('in', flush=True)\n    time.sleep(60)"


@pytest.fixture
def hold(out):
    """hold() -> a process that has the folder."""
    started = []

    def start():
        command = [sys.executable, "-c", HOLD, str(out), "--hub_token", "hf_secret", "--x_key=k1"]
        root = os.path.dirname(finetune.__file__)
        started.append(subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "in\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_in_the_folder_is_refused_by_name(train, out, hold):
    process = hold()
    with pytest.raises(UserError, match=f"in use by process {process.pid} on .*--hub_token ... --x_key=...") as error:
        train()
    assert "secret" not in str(error.value) + (out / lock.LOCK).read_text() and "k1" not in str(error.value)
    process.kill()
    process.wait()
    train("--max_steps", 1)
    assert not (out / lock.LOCK).exists()


def test_a_run_that_lost_its_folder_stops_before_it_writes(train, out, monkeypatch):
    step = trainer_module.SafeTrainer.training_step

    def lose(self, *args):
        if self.state.global_step == 3:
            (out / lock.LOCK).write_text(json.dumps({"host": "other", "pid": 7, "command": "finetune.py"}))
        return step(self, *args)

    monkeypatch.setattr(trainer_module.SafeTrainer, "training_step", lose)
    with pytest.raises(UserError, match="process 7 on other .* has taken over"):
        train()
    assert names(out) == ["checkpoint-2"]


def test_locks_of_the_dead_are_recognised(out, hold, monkeypatch, capsys):
    with lock.only_run_in(out):
        mine = json.loads((out / lock.LOCK).read_text())
    assert not out.exists()
    monkeypatch.setattr(lock, "WAIT", 3)
    monkeypatch.setattr(lock, "BEAT", 1)
    process = hold()
    theirs = json.loads((out / lock.LOCK).read_text())
    os.kill(process.pid, signal.SIGSTOP)  # no heartbeat: that alone counts where processes cannot be seen
    for name, content, taken in [
            ("its id is another process's now", {**theirs, "started": "1"}, True), ("alive", theirs, False),
            ("another container's", {**theirs, "pids": "other"}, True),
            ("another machine's", {**theirs, "host": "x"}, True),
            ("an older form", {"host": theirs["host"]}, True), ("mine", mine, True), ("no JSON", "{", True)]:
        (out / lock.LOCK).write_text(content if isinstance(content, str) else json.dumps(content))
        start = time.monotonic()
        try:
            with lock.only_run_in(out):
                assert taken, name
        except UserError:
            assert not taken, name
        assert ("another" in name and "its" not in name) == (time.monotonic() - start > 2), name
    assert "looking for 3 s whether the run of process" in capsys.readouterr().out


# Nobody let in -------------------------------------------------------------------------------------------------------

class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_strangers_checkpoint_is_one_line(train, out, finished, tmp_path, name):
    shutil.copytree(finished, out)
    folder = out / "checkpoint-4"
    run = checkpoints.read_manifest(folder)
    torch.save({"x": Evil(tmp_path / "ran")}, folder / name)
    checkpoints.write_manifest(folder, run)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be loaded: .* more than numbers \((posix|os)?.?mkdir\)"):
        train("--resume_from_checkpoint", folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_deepspeeds_part_of_a_checkpoint_does_not_run(make_model, cache_dir, tmp_path):
    out = tmp_path / "out"

    def finetune_under_deepspeed(*flags):
        return subprocess.run([
            sys.executable, finetune.__file__, "--model_name_or_path", str(make_model()), "--data_path",
            str(EXAMPLES / "data"), "--output_dir", str(out), "--cache_dir", str(cache_dir), "--max_steps", "2",
            "--save_steps", "1", "--deepspeed", "ds_config_zero2.json", *flags], capture_output=True, text=True)

    assert finetune_under_deepspeed().returncode == 0
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    [part] = (out / "checkpoint-1").rglob("*optim_states.pt")
    again = finetune_under_deepspeed()  # what is there beside tensors is known
    assert again.returncode == 0 and f"Resuming from {out}/checkpoint-1" in again.stdout, again.stderr
    assert (out / "model.safetensors").read_bytes() == weights
    shutil.rmtree(out / "checkpoint-2")
    run = checkpoints.read_manifest(out / "checkpoint-1")
    state = torch.load(part, weights_only=False)
    torch.save({**state, "x": Evil(tmp_path / "ran")}, part)
    checkpoints.write_manifest(out / "checkpoint-1", run)
    refused = finetune_under_deepspeed()
    assert refused.returncode == 2 and not (tmp_path / "ran").exists() and "Traceback" not in refused.stderr
    assert "its pickles hold more than numbers" in refused.stderr and "--trust_checkpoint" in refused.stderr
    trusted = finetune_under_deepspeed("--trust_checkpoint", "True")
    assert trusted.returncode == 0 and (tmp_path / "ran").exists()
