"""Folders that programs read from and write to: what is wrong with them is known before anything is loaded."""

import difflib
import errno
import glob
import hashlib
import json
import os
import re
import shutil

import xxhash

from mechanisms.errors import UserError, first_line

MANIFEST = "complete.json"  # written last into a checkpoint
QWEN1_PREFIX = "qwen1-"  # of the folder around a Qwen-1 model that was written as a Qwen2 folder


def could_be_on_the_hub(path):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None


def model_folder(path):
    """Where a model of the Hub's cache lies in its folder models--X--Y: the snapshot of the main branch.

    Any other path is returned as it is.
    """
    try:
        with open(os.path.join(path, "refs", "main"), encoding="utf-8") as file:
            return os.path.join(path, "snapshots", file.read().strip())
    except (FileNotFoundError, NotADirectoryError):
        return path


def hub_name(path):
    """The name on the Hub, X/Y, of a snapshot in its cache (models--X--Y/snapshots/...); None for any other path."""
    match = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", os.path.abspath(path))
    return match and "/".join(match.groups())


def deepspeed_file(value):
    """The config that --deepspeed names, None for "" and "none": the launchers give one, this takes it back.

    A name that is no file here may be one of the configs beside finetune.py. Raises UserError if there is no such file,
    or it is no JSON, or a key in it is misspelt, which DeepSpeed ignores.
    """
    if value.lower() in ("", "none"):
        return None
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = next((path for path in (value, os.path.join(here, value)) if os.path.isfile(path)), None)
    if path is None:
        raise UserError(f"--deepspeed {value}: no such file")
    known = {}
    for file in glob.glob(os.path.join(glob.escape(here), "ds_config*.json")):
        for key, settings in _read_json(file).items():
            known[key] = known.get(key, {}) | (settings if isinstance(settings, dict) else {})
    try:
        config = _read_json(path)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--deepspeed {value} is no JSON object: {first_line(error)}") from error
    wrong = _misspelt(config, known)
    for key, settings in config.items():
        if isinstance(settings, dict):
            wrong += _misspelt(settings, known.get(key, {}))
    if wrong:
        raise UserError(f"--deepspeed {value}: " + "; ".join(wrong))
    return path


def _read_json(path):
    with open(path, encoding="utf-8-sig") as file:
        return dict(json.load(file).items())


def _misspelt(settings, known):
    """Keys that are nearly those of our own configs, as lines: DeepSpeed ignores what it does not know."""
    lines = []
    for key in settings.keys() - known.keys():
        near = difflib.get_close_matches(key.strip().lower(), known.keys() - settings.keys(), n=1, cutoff=0.9)
        if near:
            lines.append(f"{json.dumps(key)} is no key of DeepSpeed, which would ignore it: write \"{near[0]}\"")
    return sorted(lines)


def not_empty(flag, folder):
    """What is wrong with a folder that a program is to make, as a list of no or one line."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        return [f"{flag} {folder} is not empty: give another, or move it away"]
    return []


def check_disk(flag, folder, size):
    """Raises UserError if there is no room for `size` bytes where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{flag}: {size / 1e9:.1f} GB are needed there, and {free / 1e9:.1f} GB are free")


def digest_of(path):
    """Hex digest of a file: it shows damage, and is no defence against forgery. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def digest_of_json(value):
    """Hex digest of a JSON value: with it, a file of JSON shows its own damage."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def flush(path):
    """Have the system write a file or folder to its disk: it is there after a loss of power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do that for a folder
            raise
    finally:
        os.close(descriptor)


def usual_mode():
    """The mode of a new file, as the umask of this process has it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def size_of(folder):
    """Bytes of all files in a folder."""
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)


def checkpoints_in(output_dir):
    """checkpoint-N folders, newest (largest N) first."""
    if not os.path.isdir(output_dir):
        return []
    found = [(step, name) for name in os.listdir(output_dir) if (step := step_of(name)) is not None]
    return [os.path.join(output_dir, name) for _, name in sorted(found, reverse=True)]


def step_of(folder):
    """N of .../checkpoint-N; None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(folder)))
    return int(match[1]) if match else None


def find_base(path, base_model=None):
    """The base model of the adapter at `path`: `base_model` if given, else what the adapter says. None: a whole model.

    An adapter of a Qwen-1 model names the Qwen2 folder that was written for it; if that is gone, the model it was
    written from is the base. Raises UserError if there is neither a model nor an adapter at `path`, or no base model
    where it should be.
    """
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"{path}: no such folder")
    config = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(config):
        if base_model:
            raise UserError(f"--base_model is for adapters, and there is no adapter_config.json in {path}")
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            complete = [folder for folder in checkpoints_in(path) if os.path.isfile(os.path.join(folder, MANIFEST))]
            raise UserError(f"{path} holds neither a model (config.json) nor an adapter (adapter_config.json)"
                            + (f". Its newest complete checkpoint is {complete[0]}" if complete else ""))
        return None
    try:
        with open(config, encoding="utf-8") as file:
            base = base_model or json.load(file)["base_model_name_or_path"] or "?"
    except (ValueError, KeyError) as error:
        raise UserError(f"{config} is damaged: {first_line(error)}") from error
    if not base_model and not os.path.isdir(base) and is_converted_folder(base):
        base = card_metadata(path).get("base_model", base)
    if not os.path.isdir(base) and not could_be_on_the_hub(base):
        raise UserError(f"--base_model {base}: no such folder" if base_model else
                        f"the base model of {path} is {base}, and there is no such folder now: say with --base_model "
                        "where that model is")
    return base


def is_converted_folder(path):
    """Whether `qwen1.convert_if_qwen1` wrote the folder `path`, by its name: it may be gone."""
    return os.path.basename(os.path.dirname(path)).startswith(QWEN1_PREFIX)


def source_name(path):
    """Name or folder of the Qwen-1 model that a folder was converted from, or the name of a snapshot in the Hub's
    cache; any other path as it is."""
    return card_metadata(path).get("converted_from", hub_name(path) or path)


def card_metadata(folder):
    """The metadata of the model card in `folder`; {} if there is none."""
    from huggingface_hub import metadata_load  # takes a while to import

    try:
        return metadata_load(os.path.join(folder, "README.md")) or {}
    except (OSError, ValueError):
        return {}
