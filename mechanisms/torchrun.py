"""torchrun, but a failed run ends with one message, that of the rank that failed first, not a page of ChildFailedError.

Only the first rank of a machine to fail leaves an error file (mechanisms/errors.py): the others fail because it did.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

BROUGHT_DOWN = (-signal.SIGTERM, -signal.SIGABRT)  # by torchrun and by NCCL, because another rank had failed


def first_failure(failures):
    """{rank: ProcessFailure} -> (rank, failure): one that was killed, else one with a message, else the earliest."""
    return min(failures.items(), key=lambda item: (
        item[1].exitcode >= 0 or item[1].exitcode in BROUGHT_DOWN, item[1].error_file == "<N/A>", item[1].timestamp))


try:
    run(parse_args(None))
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
except ChildFailedError as error:
    rank, failure = first_failure(error.failures)
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    code = failure.exitcode
    if code in BROUGHT_DOWN and failure.error_file != "<N/A>":  # it had said why, but another rank was faster to exit
        code = 2 if message.startswith("error: ") else 1
    if code < 0:
        message = f"killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        message += ", as the kernel does when memory runs out (dmesg)"
    first_line = str(message).split("\n")[0]  # the rank itself has said the rest
    print(f"rank {rank} failed first: {first_line}", file=sys.stderr)
    sys.exit(code if code > 0 else 128 - code)
