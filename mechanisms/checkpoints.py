"""Checkpoints one can trust: complete by proof, resumed only by the run they belong to.

Trainer writes a checkpoint file by file; a kill in between leaves a folder that looks like one. So a manifest with the
size of every file is written last, after every rank has finished, and a checkpoint without a manifest that holds is
skipped on resume. Renaming a finished folder into place would be simpler, but on several nodes the rename races
with ranks that still write their part; transformers tried it twice and took it back.
"""

import json
import os
import shlex

from mechanisms.errors import UserError
from mechanisms.paths import MANIFEST, checkpoints_in

MORE_STEPS = "steps"  # the one fact of a run that may grow


def write_manifest(folder, run, resumable=True):
    """Declare `folder` complete: every file in it with its size, and `run`, the facts a resume must agree with.

    resumable: whether it holds the optimizer, the schedule and the place in the data, and not the weights alone.
    """
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
    sizes.pop(MANIFEST, None)
    unfinished = os.path.join(folder, MANIFEST + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"run": run, "resumable": resumable, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, os.path.join(folder, MANIFEST))


def read_manifest(folder):
    """The `run` facts of a checkpoint to resume from, or a str that says why it is none."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return f"no {MANIFEST}: it was not written to the end"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, size in manifest["files"].items():
        try:
            found = os.path.getsize(os.path.join(folder, name))
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    if not manifest.get("resumable", True):
        return "it holds no optimizer (--save_only_model)"
    return manifest["run"]


def checkpoint_to_resume(output_dir, wanted):
    """Find the checkpoint to resume.

    Args:
        output_dir: the run's folder.
        wanted: None (the newest complete checkpoint, if there is one), "True" (the same, but there must be one),
            "False" (start over; the folder must then hold no results) or the path of a checkpoint.

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
        state = read_manifest(wanted)
        if isinstance(state, str):
            raise UserError(f"--resume_from_checkpoint {wanted}: cannot be resumed: {state}")
        return wanted, notices
    for path in found:
        state = read_manifest(path)
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
    different, notes = differences(read_manifest(checkpoint), run, defaults)
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
        if _content(old) == _content(new):
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
