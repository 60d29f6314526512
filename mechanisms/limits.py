"""Limits of time and memory for a model's chat template: a program that somebody else wrote."""

import contextlib
import functools
import os
import resource
import signal
import threading

from mechanisms.errors import UserError

SECONDS, BYTES = 10, 2 << 30  # for one conversation; templates take less than a millisecond and some kilobytes


def limited(render, whose):
    """`render`, a function that runs a chat template; UserError where it takes more than the limits.

    whose: the name of the model, for the message. What is returned can be pickled, as for the data loader's processes.
    """
    return functools.partial(_within_limits, render, whose)


def _within_limits(render, whose, *args, **kwargs):
    try:
        with _limits():
            return render(*args, **kwargs)
    except TimeoutError:
        raise UserError(f"the chat template of {whose} does not end within {SECONDS} s: it is not used") from None
    except (MemoryError, OverflowError, RecursionError) as error:
        raise UserError(f"the chat template of {whose} makes too much of a conversation ({type(error).__name__}; "
                        f"more than {BYTES >> 30} GB are not given to it): it is not used") from None


@contextlib.contextmanager
def _limits():
    """In force until its end; the time only in the main thread, as others get no signals."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _size() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    timed = threading.current_thread() is threading.main_thread()
    if timed:
        before = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(*_):
    raise TimeoutError


def _size():
    """Bytes of address space of this process."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(descriptor, 100).split()[0]) * resource.getpagesize()
    finally:
        os.close(descriptor)
