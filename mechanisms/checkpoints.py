"""Checkpoints one can trust: complete by proof, resumed only by the run they belong to.

Trainer writes a checkpoint file by file; a kill in between leaves a folder that looks like one. So a manifest with the
size of every file is written last, after every rank has finished, and a checkpoint without a manifest that holds is
passed over on resume. Renaming a finished folder into place would be simpler, but on several nodes the rename races
with ranks that still write their part; transformers tried it twice and took it back.
"""

import json
import os
import re
import shlex

from mechanisms.errors import UserError

MANIFEST = "complete.json"


def write_manifest(folder, run):
    """Declare `folder` complete: every file in it with its size, and `run`, the facts a resume must agree with."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
    sizes.pop(MANIFEST, None)
    unfinished = os.path.join(folder, MANIFEST + ".unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump({"run": run, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, os.path.join(folder, MANIFEST))


def read_manifest(folder):
    """The `run` facts of a complete checkpoint, or a str that says why it is not complete."""
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
    return manifest["run"]


def checkpoints_in(output_dir):
    """checkpoint-N folders, newest (largest N) first."""
    if not os.path.isdir(output_dir):
        return []
    matches = map(re.compile(r"checkpoint-(\d+)").fullmatch, os.listdir(output_dir))
    found = [(int(match[1]), match[0]) for match in matches if match]
    return [os.path.join(output_dir, name) for _, name in sorted(found, reverse=True)]


def checkpoint_to_resume(output_dir, wanted):
    """Find where to go on.

    Args:
        output_dir: the run's folder.
        wanted: None (the newest complete checkpoint, if there is one), "True" (the same, but there must be one),
            "False" (start over; the folder must then hold no results) or the path of a checkpoint.

    Returns:
        (path or None, notices): the notices name checkpoints passed over and why.

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
            raise UserError(f"--resume_from_checkpoint {wanted}: not a complete checkpoint: {state}")
        return wanted, notices
    for path in found:
        state = read_manifest(path)
        if not isinstance(state, str):
            return path, notices
        notices.append(f"{path} is passed over: {state}")
    if wanted is not None:
        raise UserError(f"--resume_from_checkpoint True: no complete checkpoint in {output_dir}"
                        + "".join(f"\n       {notice}" for notice in notices))
    return None, notices


def check_same_run(checkpoint, run):
    """Refuse to go on from a checkpoint of another run: its place in the data would mean something else here.

    run: {flag or fact: value} of this command. Raises UserError that lists every difference.
    """
    before = read_manifest(checkpoint)
    different = [f"{name}: {before[name]!r} in the checkpoint, {value!r} now" for name, value in run.items()
                 if name in before and before[name] != value]
    if not different:
        return
    advice = "Give the same settings to go on, or another --output_dir to start a new run."
    if [line.split(":")[0] for line in different] == ["ranks"]:
        part = os.path.join(checkpoint, f"global_step{os.path.basename(checkpoint).rpartition('-')[2]}")
        advice = ("DeepSpeed's part of a checkpoint is cut for its number of ranks. To go on with another number, "
                  f"convert it once:\n         {shlex.join(universal_command(part))}\n"
                  '       and add "checkpoint": {"load_universal": true} to the --deepspeed config.')
    raise UserError(f"{checkpoint} belongs to a run with other settings:\n       " + "\n       ".join(different)
                    + f"\n       {advice}")


def universal_command(part):
    """The command that makes a checkpoint's DeepSpeed folder, checkpoint-N/global_stepN, fit any number of ranks."""
    return ["python", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--input_folder", part,
            "--output_folder", f"{part}_universal"]
