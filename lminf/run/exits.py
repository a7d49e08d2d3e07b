"""How a command ends when it cannot go on: one line for the user, and an exit status."""

import contextlib
import os
import sys
from collections.abc import Iterator

from lminf.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
BROKEN_PIPE = 141  # and for one whose reader went away, as in `lminf list | head -1`


@contextlib.contextmanager
def orderly(*, debug: bool) -> Iterator[None]:
    """Ends the process with one line instead of a traceback where the cause is not a defect."""
    try:
        yield
        sys.stdout.flush()  # here, so that a closed pipe is noticed inside
    except InputError as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
