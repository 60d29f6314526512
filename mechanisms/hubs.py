"""Names on the Hugging Face Hub or, with the environment variable MODELSCOPE=1, on ModelScope -> what they hold, here.

Both keep what they have downloaded: without a network it is taken from there.
"""

import os

from mechanisms.errors import UserError, first_line
from mechanisms.paths import could_be_on_the_hub
from mechanisms.sources import DATA_ENDINGS


def uses_modelscope() -> bool:
    return os.environ.get("MODELSCOPE", "").lower() not in ("", "0", "false", "no")


def model_here(path: str, cache_dir: str | None = None) -> str:
    """`path`, or for a name under MODELSCOPE=1 the folder that ModelScope's package has downloaded. Raises UserError.
    """
    if not uses_modelscope() or os.path.exists(path) or not could_be_on_the_hub(path):
        return path
    return _from_modelscope(path, "model", cache_dir)


def dataset_files(name: str, split: str | None, cache_dir: str | None = None) -> list[str]:
    """The data files of one split of a dataset, downloaded; `datasets` knows which they are. Raises UserError.

    split may be None if there is only one.
    """
    from datasets import load_dataset_builder  # takes seconds to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if uses_modelscope():
            folder = _from_modelscope(name, "dataset", cache_dir)
        else:
            folder = snapshot_download(name, repo_type="dataset", cache_dir=cache_dir, allow_patterns=[
                "README.md", *(f"*{ending}" for ending in DATA_ENDINGS)])
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is no file or folder here, and no dataset of the Hugging Face Hub that you may read "
                        "(if it is private or gated: hf auth login)") from error
    except OSError as error:
        raise UserError(f"{name} is no file or folder here, and as a dataset of the Hugging Face Hub it cannot be had: "
                        f"{first_line(error.__cause__ or error)}. Where there is a network, hf download {name} "
                        "--repo-type dataset --local-dir FOLDER; then give that folder") from error
    try:
        splits = load_dataset_builder(folder).config.data_files or {}
    except (OSError, ValueError) as error:
        raise UserError(f"which files of the dataset {name} are which split cannot be told: {first_line(error)}. "
                        "Download it and give its files") from error
    if split is None and len(splits) == 1:
        [split] = splits
    if split not in splits:
        raise UserError(f"{name} holds the splits {', '.join(sorted(map(str, splits)))}. Name one: "
                        f"{name}:{sorted(map(str, splits))[-1]}")
    return list(splits[split])


def _from_modelscope(name, kind, cache_dir):
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError(f"MODELSCOPE is set, so {name} is looked for on ModelScope, and that needs its package: pip "
                        "install modelscope. Or unset MODELSCOPE") from error
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.utils import WeakFileLock

    try:
        os.makedirs(HF_HOME, exist_ok=True)
        with WeakFileLock(os.path.join(HF_HOME, "finetune_modelscope.lock")):  # ranks ask at once
            return snapshot_download(name, repo_type=kind, cache_dir=cache_dir)
    except Exception as error:  # its errors have no type in common
        raise UserError(f"{name} is no folder here, and as a {kind} of ModelScope it cannot be had: "
                        f"{first_line(error)}") from error
