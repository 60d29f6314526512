"""Checkpoints one can trust: complete by proof, resumed only by the run they belong to.

Trainer writes a checkpoint file by file; a kill in between leaves a folder that looks like one. So a manifest with the
size and a digest of every file is written last, after every rank has finished and everything is on the disk, and a
checkpoint without a manifest that holds is skipped on resume. Renaming a finished folder into place would be simpler,
but on several nodes the rename races with ranks that still write their part; transformers tried it twice and took it
back.
"""

import concurrent.futures
import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import stat

import torch
from safetensors import SafetensorError, safe_open

from mechanisms.errors import UserError
from mechanisms.finite import all_finite
from mechanisms.paths import (
    MANIFEST,
    checkpoints_in,
    digest_of,
    digest_of_json,
    flush,
    size_of,
    step_of,
    usual_mode,
)

MORE_STEPS = "steps"  # the one fact of a run that may grow
ANY = "any"  # a fact that a run does not ask of its checkpoint
ABANDONED = "abandoned"  # folder in the output folder for what is not resumed from any more
SMALL = 1 << 20  # bytes of a file whose digest is verified even where sizes are enough
LARGEST_MANIFEST = 1 << 26
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of the environment: torch.load runs no code, whatever it is told
ONLY_MODEL = "it holds no optimizer (--save_only_model)"


def settle(folder):
    """Give all files in a folder the mode that the umask asks for, and have them on the disk. Raises OSError.

    Returns {name: {"bytes": size, "digest": hex digest}}.
    """
    names = sorted(os.path.relpath(os.path.join(parent, name), folder)
                   for parent, _, files in os.walk(folder) for name in files)
    mode = usual_mode()

    def settle_file(name):
        path = os.path.join(folder, name)
        if stat.S_IMODE(os.stat(path).st_mode) != mode:  # safetensors' files can be read by their owner alone
            with contextlib.suppress(PermissionError):  # on file systems that know no modes
                os.chmod(path, mode)
        flush(path)
        return {"bytes": os.path.getsize(path), "digest": digest_of(path)}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(names, pool.map(settle_file, names)))
    for parent, *_ in os.walk(folder, topdown=False):
        flush(parent)
    flush(os.path.dirname(os.path.abspath(folder)))
    return found


def write_manifest(folder, run, resumable=True, ranks=1):
    """Declare `folder` complete: every file in it, and `run`, the facts a resume must agree with. Raises OSError.

    resumable: whether it holds the optimizer, the schedule and the place in the data, and not the weights alone.
    """
    remove_manifest(folder)
    manifest = {"step": step_of(folder), "ranks": ranks, "run": run, "resumable": resumable, "files": settle(folder)}
    unfinished = os.path.join(folder, MANIFEST + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({**manifest, "digest": digest_of_json(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, os.path.join(folder, MANIFEST))
    flush(folder)


def remove_manifest(folder):
    """Before anything in a complete checkpoint is changed: it is none from now on. Raises OSError."""
    for name in (MANIFEST, MANIFEST + ".unfinished"):
        if os.path.lexists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
            flush(folder)


def remove(folder):
    """Delete a checkpoint so that what a kill leaves of it is no complete one. Raises OSError."""
    remove_manifest(folder)
    shutil.rmtree(folder)


def read_manifest(folder, verify="full"):
    """The `run` facts of a checkpoint to resume from, or a str that says why it is none.

    verify: "full" reads all files again, "sizes" the small ones.
    """
    manifest = _read(os.path.join(folder, MANIFEST))
    if isinstance(manifest, str):
        return manifest
    if manifest["step"] not in (None, step_of(folder)) and step_of(folder) is not None:
        return f"{MANIFEST} is that of step {manifest['step']}"

    def check(item):
        name, written = item
        path = os.path.join(folder, name)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != written["bytes"]:
                return f"{name} has {found.st_size:,} bytes instead of {written['bytes']:,}"
            if (verify == "full" or found.st_size < SMALL) and digest_of(path) != written["digest"]:
                return f"{name} is damaged: its content is not what was written"
            if verify == "full" and name.endswith(".safetensors") and not _weights_are_finite(path):
                return f"{name} holds numbers that are not finite"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for problem in pool.map(check, sorted(manifest["files"].items(), key=lambda item: item[1]["bytes"])):
            if problem:
                pool.shutdown(cancel_futures=True)
                return problem
    if not manifest["resumable"]:
        return ONLY_MODEL
    return manifest["run"]


def is_whole(folder):
    """Whether a checkpoint is complete, by its manifest and the sizes of its files: good to load, if not to resume."""
    state = read_manifest(folder, "sizes")
    return isinstance(state, dict) or state == ONLY_MODEL


def _read(path):
    """A manifest of the form that `write_manifest` gives it, or a str that says what is wrong."""
    damaged = f"{MANIFEST} is damaged"
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_MANIFEST:
            return damaged
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written to the end"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return damaged
    if not isinstance(manifest, dict) or "digest" not in manifest:
        return f"{MANIFEST} is damaged, or of an earlier version of this program"
    if manifest.pop("digest") != digest_of_json(manifest) or not _well_formed(manifest):
        return damaged
    return manifest


def _well_formed(manifest):
    """Whether a manifest has the fields that `write_manifest` writes, each of its kind."""
    kinds = {"step": (int, type(None)), "ranks": int, "run": dict, "resumable": bool, "files": dict}
    if manifest.keys() != kinds.keys() or not all(isinstance(manifest[name], kind) for name, kind in kinds.items()):
        return False
    return isinstance(manifest["run"].get(MORE_STEPS), int) and all(
        _is_below(name) and isinstance(file, dict) and file.keys() == {"bytes", "digest"}
        and isinstance(file["bytes"], int) and isinstance(file["digest"], str)
        for name, file in manifest["files"].items()) and bool(manifest["files"])


def _is_below(name):
    """Whether the path is one below the folder it is relative to."""
    return os.path.normpath(name) == name and not os.path.isabs(name) and name.split(os.sep)[0] != os.pardir


def _weights_are_finite(path):
    with safe_open(path, framework="pt") as file:
        return all_finite(file.get_tensor(name) for name in file.keys())


def deepspeed_classes():
    """What the pickles of a DeepSpeed checkpoint hold beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def no_code_from_pickles(checkpoint, classes, trusted=False):
    """While a checkpoint is loaded: its pickles give tensors, plain values and these classes, or a UserError.

    DeepSpeed loads its files with weights_only=False, which runs whatever code stands in them. Can go when it does not
    (https://github.com/deepspeedai/DeepSpeed/pull/6751 made it explicit). trusted: let it.
    """
    before = os.environ.get(WEIGHTS_ONLY)
    if not trusted:
        os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported global:|class|Unsupported class) ([\w.]+)", str(error))
        raise UserError(
            f"{checkpoint} cannot be loaded: its pickles hold more than numbers"
            + f" ({found[1]})" * bool(found) + ", and code in them could do anything. Delete it, or, if it is your own "
            "run's and the code is the optimizer's, give --trust_checkpoint") from error
    finally:
        os.environ.pop(WEIGHTS_ONLY, None) if before is None else os.environ.update({WEIGHTS_ONLY: before})


def set_aside(output_dir, checkpoint):
    """Move what the run will not go on from out of its way: broken checkpoints, and those ahead of where it goes on.

    checkpoint: that resumed from, or None. What is moved lies in output_dir/abandoned then. Returns lines that say so.
    Raises OSError.
    """
    start, lines = 0 if checkpoint is None else step_of(checkpoint), []
    for path in checkpoints_in(output_dir):
        if checkpoint and os.path.exists(path) and os.path.samefile(path, checkpoint):
            continue
        ahead = start is not None and step_of(path) >= start
        if not ahead and is_whole(path):
            continue
        os.makedirs(os.path.join(output_dir, ABANDONED), exist_ok=True)
        target, number = os.path.join(output_dir, ABANDONED, os.path.basename(path)), 1
        while os.path.lexists(target):
            number += 1
            target = os.path.join(output_dir, ABANDONED, f"{os.path.basename(path)}.{number}")
        os.replace(path, target)
        why = f"ahead of step {start}, from where this run resumes" if ahead and is_whole(target) else "not complete"
        lines.append(f"{path} is moved to {target}: {why}")
    return lines


def rotate(output_dir, keep, best=None):
    """Delete the oldest complete checkpoints but for `keep` of them and `best`. Raises OSError."""
    whole = [path for path in checkpoints_in(output_dir) if is_whole(path)]
    for path in whole[max(1, keep):]:
        if not (best and os.path.exists(best) and os.path.samefile(path, best)):
            remove(path)


def room_problem(output_dir, needed):
    """Why `needed` bytes cannot be written to the folder, naming what fills it, or None."""
    free = shutil.disk_usage(output_dir).free
    if free >= needed:
        return None
    folders = [*checkpoints_in(output_dir), os.path.join(output_dir, ABANDONED)]
    there = ", ".join(f"{os.path.basename(path)}: {size_of(path) / 1e9:.2g} GB" for path in folders
                      if os.path.isdir(path))
    return (f"about {needed / 1e9:.2g} GB are needed in {output_dir} and {free / 1e9:.2g} GB are free"
            + f" (it holds {there})" * bool(there))


def checkpoint_to_resume(output_dir, wanted, verify="full"):
    """Find the checkpoint to resume.

    Args:
        output_dir: the run's folder.
        wanted: None (the newest complete checkpoint, if there is one), "True" (the same, but there must be one),
            "False" (start over; the folder must then hold no results) or the path of a checkpoint.
        verify: see `read_manifest`.

    Returns:
        (path or None, notices): the notices name the checkpoints skipped and why.

    Raises:
        UserError: as `wanted` says.
    """
    found, notices = checkpoints_in(output_dir), []
    if str(wanted).lower() == "false":
        results = found + [path for path in (os.path.join(output_dir, name) for name in
                                             ("config.json", "adapter_config.json")) if os.path.exists(path)]
        if results:
            raise UserError(f"--resume_from_checkpoint False starts over, but {output_dir} already holds results "
                            f"({os.path.basename(results[0])}{', ...' if len(results) > 1 else ''}). "
                            "Choose another --output_dir, or move that folder away.")
        return None, notices
    if wanted is not None and str(wanted).lower() != "true":
        if not os.path.isdir(wanted):
            raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
        state = read_manifest(wanted, verify)
        if isinstance(state, str):
            raise UserError(f"--resume_from_checkpoint {wanted}: cannot be resumed: {state}")
        return wanted, notices
    for path in found:
        state = read_manifest(path, verify)
        if not isinstance(state, str):
            return path, notices
        notices.append(f"{path} is skipped: {state}")
    if wanted is not None:
        raise UserError(f"--resume_from_checkpoint True: no complete checkpoint in {output_dir}"
                        + "".join(f"\n       {notice}" for notice in notices))
    return None, notices


def check_same_run(checkpoint, run, defaults):
    """Refuse to resume a checkpoint of another run. Returns notes of what differs and may.

    run: the facts of this command; defaults: see `differences`. Raises UserError that lists every difference.
    """
    different, notes = differences(read_manifest(checkpoint, "sizes"), run, defaults)
    if not different:
        return notes
    advice = "Give the same settings to resume, or another --output_dir to start a new run."
    if [line.split(":")[0] for line in different] == ["ranks"]:
        part = os.path.join(checkpoint, f"global_step{os.path.basename(checkpoint).rpartition('-')[2]}")
        advice = ("DeepSpeed's part of a checkpoint is cut for its number of ranks. To resume with another number, "
                  f"convert it once:\n         {shlex.join(universal_command(part))}\n"
                  '       and add "checkpoint": {"load_universal": true} to the --deepspeed config.')
    raise UserError(f"{checkpoint} belongs to a run with other settings:\n       " + "\n       ".join(different)
                    + f"\n       {advice}")


def differences(before: dict, now: dict, defaults: dict) -> tuple[list[str], list[str]]:
    """(what forbids to resume, what is only worth a note), each a line with both values.

    Args:
        before, now: the facts of a checkpoint and of this run.
        defaults: {field: default value}. What a checkpoint does not say, it was written before the flag was there.
    """
    forbidden, notes = [], []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, defaults.get(name)), now.get(name, defaults.get(name))
        if _content(old) == _content(new) or new == ANY:
            continue
        line = f"{name}: {_shown(old)} in the checkpoint, {_shown(new)} now"
        more = name == MORE_STEPS and old is not None and new > old
        (notes if more else forbidden).append(line + ": the learning rate follows the longer schedule" * more)
    return forbidden, notes


def _content(value):
    return value["content"] if isinstance(value, dict) and value.keys() == {"name", "content"} else value


def _shown(value):
    return repr(value) if _content(value) is value else f"{value['name']!r} ({value['content']})"


def universal_command(part):
    """The command that makes a checkpoint's DeepSpeed folder, checkpoint-N/global_stepN, fit any number of ranks."""
    return ["python", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--input_folder", part,
            "--output_folder", f"{part}_universal"]
