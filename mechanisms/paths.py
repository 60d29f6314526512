"""Folders that programs read from and write to: what is wrong with them is known before anything is loaded."""

import os
import re
import shutil

from mechanisms.errors import UserError


def could_be_on_the_hub(path):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None


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
