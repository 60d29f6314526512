"""A fork whose child comes to life.

In a child of Python 3.11.0 to 3.11.9 `os.fork` waits for ever if another thread was about to enter the interpreter, as
gloo's threads are after each collective: about one in two thousand of the data loader's processes, and with it the
whole run. https://github.com/python/cpython/issues/112275. Can go when 3.11.10 is the oldest supported.
"""

import itertools
import os
import select
import signal
import sys

_fork = os.fork


def install():
    """From now on `os.fork` is `fork`, where Python's own may wait for ever."""
    if sys.version_info < (3, 11, 10):
        os.fork = fork


def fork():
    """os.fork; a child that does not return from it within a second is killed and another made, with twice the time."""
    for attempt in itertools.count():
        ours, theirs = os.pipe()
        child = _fork()
        if child == 0:
            os.write(theirs, b"\0")
        os.close(theirs)
        alive = child == 0 or _comes(ours, seconds=2**attempt)
        os.close(ours)
        if alive:
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _comes(pipe, seconds):
    """Whether something comes through it in time; also if its other end is closed, as by a child that died."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * seconds))
