"""One function over many items, on all cores."""

import collections
import concurrent.futures
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from mechanisms.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST = 32  # processes; beyond that the one that reads and writes the files sets the pace


def count_cores() -> int:
    """How many processes `on_all_cores` takes."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # macOS
    return min(MOST, len(allowed))


def on_all_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) of each item, in their order, computed by as many processes as there are cores.

    The processes are forks of this one: they have all that `function` needs without a copy, and it must not touch the
    GPU. Items are taken at most two per process ahead. A single item is computed here.

    Raises what `function` raises, and UserError if a process is killed.
    """
    items = iter(items)
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    cores = count_cores()
    gc.freeze()  # what there is already is not searched for garbage, which in a fork would copy all of it
    pool = concurrent.futures.ProcessPoolExecutor(
        cores, multiprocessing.get_context("fork"), initializer=_begin, initargs=(function,))
    try:
        results = collections.deque()
        for item in itertools.chain(first, items):
            results.append(pool.submit(_compute, item))
            if len(results) > 2 * cores:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a process that prepared the data was killed, usually because the memory ran out (dmesg says "
                        "so then): free some, or allow fewer cores with taskset") from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def _begin(function):
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them: the parent says it and ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A parent that was killed cannot end its children."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _compute(item):
    return _function(item)
