"""What --data_path names: files, folders, globs and datasets of a hub, with the share of each that is taken."""

import glob
import json
import os
import re
from collections.abc import Callable

from mechanisms.errors import UserError, first_line
from mechanisms.paths import could_be_on_the_hub

# Of data files that are looked for in a folder; a file that is named may have any name.
DATA_ENDINGS = (*(f".{kind}{packed}" for kind in ("json", "jsonl", "csv", "tsv")
                  for packed in ("", ".gz", ".bz2", ".zst")), ".parquet", ".arrow")


def data_files(words: list[str], of_hub: Callable[[str, str | None], list[str]] = lambda name, split: []
               ) -> tuple[dict[str, float], list[str]]:
    """Words of --data_path -> ({file: share of it to take}, in a fixed order, lines: what is wrong with them).

    A word is a file, a folder (every data file below, or the shards of one that `datasets` wrote with save_to_disk), a
    glob, or NAME or NAME:SPLIT of a dataset on a hub, each also with :SHARE behind. What is here comes first: a file
    whose name ends in :0.3, and a folder with the name of a dataset.

    of_hub(name, split) -> the files of a dataset on a hub, split being None if none is named, or a UserError. Without
    it such a name is not looked up.
    """
    files, problems = {}, []
    for word in words:
        found, share = _here(word, problems), 1.0
        if found is None and (match := re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", word)):
            word, share = match[1], float(match[2])
            found = _here(word, problems)
            if not share:
                problems.append(f"{word}:{match[2]}: a share is more than 0, as in {word}:0.3 or {word}:2")
        name, _, split = word.partition(":")
        if found is None and _names_a_dataset(name):
            try:
                found = of_hub(name, split or None)
            except UserError as error:
                problems.append(str(error))
        elif found is None:
            problems.append(f"no such file, folder or match: {word}")
        for path in found or ():
            if files.setdefault(path, share) != share:
                problems.append(f"{path} is named twice, with the shares {files[path]:g} and {share:g}")
    return files, problems


def _here(word, problems):
    """The data files that a word names on this machine; None if there are none."""
    if os.path.isdir(word):
        found = _files_below(word, problems)
        if not found:
            problems.append(f"no data file (.jsonl, .json, .csv, .tsv, .parquet or .arrow) in the folder {word}")
        return found
    if os.path.isfile(word):
        return [word]
    return sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path)) or None


def _names_a_dataset(word):
    """Whether a word may be the name of a dataset, and not a path with a mistake in it."""
    return (could_be_on_the_hub(word) and not word.lower().endswith(DATA_ENDINGS)
            and not os.path.isdir(os.path.dirname(word)))


def _files_below(folder, problems):
    """The data files of a folder; what is wrong with it is added to `problems`."""
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
        if len(splits) > 1:
            problems.append(f"{folder} holds the splits {', '.join(splits)}. Name one: "
                            f"{os.path.join(folder, splits[-1])}")
    found = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        paths = [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(DATA_ENDINGS)]
        if {"state.json", "dataset_info.json"} <= set(names):
            try:
                with open(os.path.join(parent, "state.json"), encoding="utf-8") as file:
                    paths = [os.path.join(parent, shard["filename"]) for shard in json.load(file)["_data_files"]]
            except (ValueError, KeyError, TypeError, OSError) as error:
                problems.append(f"{os.path.join(parent, 'state.json')} is damaged: {first_line(error)}")
        found += [path for path in paths if os.path.basename(path) != "dataset_dict.json"]
    return found
