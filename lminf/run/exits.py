"""How a command ends when it cannot go on: one line for the user, and an exit status."""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from lminf.atomic import FULL
from lminf.errors import InputError, printable

BAD_INPUT = 2
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
TERMINATED = 143  # and for one ended by SIGTERM
# Of a name that the user gave: too long, a loop of links, a place without rights.
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
RAISED_AGAIN = 0.05  # seconds after which a stop comes again that Python ignored
BROKEN_PIPE = 141  # and for one whose reader went away, as in `lminf list | head -1`


class Terminated(KeyboardInterrupt):
    """SIGTERM, from a scheduler or `kill`: ends a command as Ctrl-C does, with its own status."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, in the main thread: no other may set handlers."""

    def terminate(number, frame):
        raise Terminated

    def raised_again(unraisable):
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        # Python ignores what a callback of the garbage collector raises (jax has one), and would
        # ignore it here too: the signal comes again once the callback is over.
        terminated = issubclass(unraisable.exc_type, Terminated)
        number = signal.SIGTERM if terminated else signal.SIGINT
        threading.Timer(RAISED_AGAIN, os.kill, (os.getpid(), number)).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, report = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    sys.unraisablehook = raised_again
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


@contextlib.contextmanager
def _remarks_last() -> Iterator[None]:
    """Warnings of libraries, and what they log, once the command has ended well; a sentence that
    says what went wrong stands alone.
    """
    remarks: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remarks.append(self.format(record))

    def keep(message, category, filename, lineno, file=None, line=None):
        del file
        remarks.append(warnings.formatwarning(message, category, filename, lineno, line).rstrip())

    handler, root = Kept(logging.WARNING), logging.getLogger()
    with warnings.catch_warnings():
        warnings.showwarning = keep
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
    for remark in remarks:
        print(remark, file=sys.stderr)


@contextlib.contextmanager
def orderly(*, debug: bool) -> Iterator[None]:
    """Ends the process with one line instead of a traceback where the cause is not a defect."""
    try:
        with _terminable(), contextlib.nullcontext() if debug else _remarks_last():
            yield
        sys.stdout.flush()  # here, so that a closed pipe is noticed inside
    except InputError as error:
        if debug:
            raise
        # Names and values of files stand in messages as they are.
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        if debug or error.errno not in (*FULL, *UNUSABLE) or not error.filename:
            raise
        said = f"{str(error.filename)[:200]}: {error.strerror}; check the name, or give another one"
        print(f"error: {printable(said)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
