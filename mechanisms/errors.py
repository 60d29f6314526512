"""How a mistake of the user ends a run: one clear message on stderr, exit code 2, no traceback."""

import contextlib
import sys


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def user_errors_end_the_program():
    """Wrap a script's main: a `UserError` is printed and exits with 2, Ctrl-C exits with 130.

    Every other exception keeps its traceback: it is our mistake, and the traceback is what we need to see.
    """
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
