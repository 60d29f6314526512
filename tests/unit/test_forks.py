"""A child that a fork leaves waiting for ever."""

import os
import signal
import time

import pytest

from mechanisms import forks


def test_a_child_that_hangs_in_its_fork_is_replaced(monkeypatch):
    hung = []

    def fork():
        child = os.fork()
        if child == 0 and not hung:
            time.sleep(60)
        hung.append(child)
        return child

    monkeypatch.setattr(forks, "_fork", fork)
    child = forks.fork()
    if child == 0:
        os._exit(7)
    assert len(hung) == 2 and hung[1] == child
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(ProcessLookupError):
        os.kill(hung[0], 0)


def test_a_child_that_dies_at_once_is_its_parent_s_to_notice(monkeypatch):
    def fork():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return child

    monkeypatch.setattr(forks, "_fork", fork)
    assert os.waitstatus_to_exitcode(os.waitpid(forks.fork(), 0)[1]) == -signal.SIGKILL
