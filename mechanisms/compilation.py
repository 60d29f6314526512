"""Locks on the folders where torch compiles DeepSpeed's ops: those of killed runs are removed.

Torch waits for them without a word, and for ever if the run that held one was killed. Can go with the torch that has
https://github.com/pytorch/pytorch/pull/190543.
"""

import contextlib
import glob
import os
import shlex
import time

import psutil
from torch.utils.cpp_extension import get_default_build_root

from mechanisms.errors import UserError

# File systems of one machine: whoever holds a file there is among its processes.
LOCAL = "apfs", "btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs"
PATIENCE = 60  # seconds without a change that a lock of an unknown maker is waited for


def clear_locks():
    """Remove the locks whose makers are gone, on the first rank of each machine. -> what there was, as lines.

    One whose maker lives is waited for by torch. For one that another machine may have made, waits until it is gone.
    Raises UserError if nothing changes beside it for a minute.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        return []
    root, notes = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(), []
    for lock in sorted(glob.glob(f"{glob.escape(root)}/**/lock", recursive=True)):
        if _is_held(lock):
            notes.append(f"another run compiles DeepSpeed's ops ({lock}): this one waits for it")
        elif _is_local(lock):
            with contextlib.suppress(FileNotFoundError):  # its maker has just finished
                os.remove(lock)
                notes.append(f"{lock} is removed: a run left it that was killed while it compiled DeepSpeed's ops")
        else:
            _wait_for(lock)
    return notes


def _is_held(lock):
    """Whether a process of this machine has the file open, as the one that made it does until it has compiled."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's, who does not compile here
            if any(os.path.exists(lock) and os.path.samefile(file.path, lock)
                   for file in process.open_files() if os.path.basename(file.path) == "lock"):
                return True
    return False


def _is_local(path):
    """Whether only processes of this machine write to the file system of this path."""
    path = os.path.realpath(path)
    kinds = {disk.mountpoint: disk.fstype for disk in psutil.disk_partitions(all=True)
             if os.path.commonpath([disk.mountpoint, path]) == disk.mountpoint}
    return kinds[max(kinds, key=len)] in LOCAL


def _wait_for(lock):
    folder = os.path.dirname(lock)
    while os.path.exists(lock):
        newest = max((entry.stat().st_mtime for entry in os.scandir(folder)), default=0)
        if time.time() - newest > PATIENCE:
            raise UserError(f"{lock}: another machine compiles DeepSpeed's ops, or a run was killed while it did; "
                            f"nothing has changed there for a minute. If no run is compiling: rm {shlex.quote(lock)}")
        time.sleep(1)
