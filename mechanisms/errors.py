"""How a mistake of the user ends a run: one clear message on stderr, exit code 2 (3: lost numbers), no traceback."""

import contextlib
import json
import os
import signal
import sys
import time


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""

    exit_code = 2


class Checks:
    """Several checks, each done `with` this object: what they find is collected, for `stop` to raise at once."""

    def __init__(self):
        self.found = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if isinstance(error, UserError):
            self.found.append(str(error))
        return isinstance(error, UserError)

    def stop(self):
        """Raises UserError with everything that was found."""
        if self.found:
            raise UserError("\n       ".join(self.found))


def first_line(error):
    return str(error).strip().split("\n")[0]


def first_to_fail(message, code=1):
    """Whether this is the first process of this machine to fail; under torchrun, leave the message for its last line.

    torchrun gives each process the name of an error file, .../attempt_N/LOCAL_RANK/error.json.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        os.close(os.open(os.path.join(os.path.dirname(error_file), os.pardir, "failed"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    with open(error_file, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": int(time.time()), "code": code}}}, file)
    return True


def _end_at_once(signal_number, frame):
    os.write(sys.stderr.fileno(), b"\ninterrupted\n")
    os._exit(130)


@contextlib.contextmanager
def interrupts_end_at_once():
    """For a library whose threads abort an interpreter that winds down: Ctrl-C does not wind it down."""
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def user_errors_end_the_program():
    """Wrap a script's main: a `UserError` is printed and exits with its code, Ctrl-C exits with 130.

    Every other exception keeps its traceback: it is our mistake, and the traceback is what we need to see. Of several
    processes on a machine, the first to fail speaks: the others fail because it did.

    Scripts read their flags in this and go on with their imports: there too, Ctrl-C ends the program with one line.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        if "torch" not in sys.modules:  # before the imports, half of which turn the exception into another one
            signal.signal(signal.SIGINT, _end_at_once)
    except UserError as error:
        sys.stdout.flush()
        if first_to_fail(f"error: {error}", error.exit_code):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if first_to_fail(f"{type(error).__name__}: {error}"):
            raise
        sys.exit(1)
