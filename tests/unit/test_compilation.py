"""Locks of torch's compilation: a killed run's goes, a living one's stays, and none is waited for without end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mechanisms import compilation
from mechanisms.errors import UserError

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Where the lock on an op is."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "cpu_adam" / "lock"


def test_a_lock_stays_while_its_maker_lives_and_goes_when_that_is_killed(lock):
    assert compilation.clear_locks() == []
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as maker:
        assert maker.stdout.readline()
        [note] = compilation.clear_locks()
        assert lock.exists() and "another run compiles" in note and str(lock) in note
        maker.send_signal(signal.SIGKILL)
        maker.wait()
    assert lock.exists()  # for ever, and torch would wait as long
    [note] = compilation.clear_locks()
    assert not lock.exists() and note.startswith(f"{lock} is removed")


def test_only_the_first_rank_of_a_machine_looks(lock, monkeypatch):
    lock.touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compilation.clear_locks() == [] and lock.exists()


def test_a_lock_of_another_machine_is_given_up_on_where_nothing_changes(lock, monkeypatch):
    monkeypatch.setattr(compilation, "_is_local", lambda path: False)
    lock.touch()
    os.utime(lock, (time.time() - 100,) * 2)
    os.utime(lock.parent, (time.time() - 100,) * 2)
    with pytest.raises(UserError, match=f"{lock}: another machine compiles .*rm {lock}"):
        compilation.clear_locks()
    (lock.parent / "cpu_adam.o").touch()  # it is at work
    monkeypatch.setattr(time, "sleep", lambda seconds: lock.unlink())
    assert compilation.clear_locks() == []


def test_network_file_systems_are_not_local(monkeypatch, tmp_path):
    def mounted(kind):
        monkeypatch.setattr(compilation.psutil, "disk_partitions", lambda all: [
            Disk("/", "ext4"), Disk(str(tmp_path), kind), Disk(str(tmp_path) + "x", "ext4")])
        return compilation._is_local(tmp_path / "a" / "lock")

    assert mounted("ext4") and not mounted("nfs4") and not mounted("fuse.sshfs")


class Disk:
    def __init__(self, mountpoint, fstype):
        self.mountpoint, self.fstype = mountpoint, fstype
