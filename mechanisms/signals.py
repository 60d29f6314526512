"""What SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 do to a run.

While it trains they are kept until all ranks agree on them at the end of a step (mechanisms/stopping.py). Before and
after that SIGTERM, SIGINT and SIGUSR2 end the program at once, with one line, and SIGUSR1 is kept for the first step.

A thread reads them: Python's own handlers would wait for the main thread, which may hang in another library.
"""

import contextlib
import os
import select
import signal
import threading

from mechanisms import forks
from mechanisms.errors import first_to_fail
from mechanisms.torchrun import end_with

# What each asks for, the stronger the greater: save; save and end with 0; save and end with this exit code.
SAVE, SAVE_AND_END = 1, 2
REQUESTS = {signal.SIGUSR1: SAVE, signal.SIGUSR2: SAVE_AND_END, signal.SIGINT: 130, signal.SIGTERM: 143}


def name_of(request):
    return next(number.name for number, value in REQUESTS.items() if value == request)


def exit_code(request):
    return 0 if request == SAVE_AND_END else request


def _write(line):
    with contextlib.suppress(OSError):  # whoever read it is gone
        os.write(2, f"\n{line}\n".encode())  # the main thread may be in the middle of a line


def end_at_once(request):
    line = "interrupted" if request == REQUESTS[signal.SIGINT] else f"ended by {name_of(request)}"
    try:
        if first_to_fail(line):
            _write(line)
    finally:
        os._exit(exit_code(request))


def silence_broken_pipes():
    """Ctrl-C also ends the `tee` that reads the output: writing to it would end the run before it has saved."""
    poll = select.poll()
    for output in (1, 2):
        poll.register(output, 0)
    for output, event in poll.poll(0):
        if event & select.POLLERR:
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


class Requests:
    """What the signals have asked for and nobody has done yet. The public methods are for the main thread."""

    def __init__(self):
        self._training, self._strongest, self._stops = False, 0, 0
        self._lock = threading.Lock()

    def keep(self):
        """From now on, until `take`."""
        self._training = True

    def take(self):
        """The strongest request that has come; 0 if none has."""
        with self._lock:
            request, self._strongest = self._strongest, 0
        return request

    def end(self):
        """Keep no more of them; end now if one that ends the program has come."""
        self._training = False
        if self._strongest > SAVE:
            end_at_once(self._strongest)

    def _come(self, request):
        if request > SAVE_AND_END:
            self._stops += 1
        # A launcher sends on what the ranks may have got themselves, and counts itself.
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        if request > SAVE and (not self._training or alone and self._stops > 1):
            end_at_once(request)
        if request > SAVE and alone:
            _write(f"{name_of(request)}: a checkpoint is saved after this step; once more ends the program at once")
        with self._lock:
            self._strongest = max(self._strongest, request)

    def read(self, pipe):
        while True:
            for number in os.read(pipe, 100):
                if number in REQUESTS:  # torch has a handler for another
                    self._come(REQUESTS[number])


requests = Requests()


def install():
    """From now on the signals are read, and every process forked from this one ends with it.

    Call it once, in the main thread, before anything heavy is imported.
    """
    global _program
    _program = os.getpid()
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in REQUESTS:
        signal.signal(number, lambda *_: None)  # Python writes those to the pipe that have a handler
    threading.Thread(target=requests.read, args=(ours,), daemon=True).start()
    os.register_at_fork(after_in_child=_begin_child)
    forks.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)  # the launcher holds back those that would come too early


def _begin_child():
    """A forked process (the data loader's, the tokenizing ones) ends with its parent, or when that says so.

    A signal to all processes of the job is none of its business: the step that is running still needs it.
    """
    global _program
    parent, _program = _program, os.getpid()
    signal.set_wakeup_fd(-1)  # the pipe is the parent's
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    end_with(parent)
    threading.Thread(target=_end_on_demand, args=(parent,), daemon=True).start()


def _end_on_demand(parent):
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
