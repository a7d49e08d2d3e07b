"""The one exception that means: the input was bad and the message says what to do about it."""

import contextlib
import re
from collections.abc import Iterator

REASON_CHARS = 200  # of what a library says about a file


def printable(text: str) -> str:
    """The text with characters that a terminal would act on, such as escape, written as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """One sentence: what was wrong, what was found, what to do. Commands exit with 2 on it."""

    def __init__(self, message: str):
        line = re.sub(r"\s*[\r\n]\s*", " ", message)
        # What files contain stands in messages: nothing in it may act on a terminal.
        super().__init__(printable(line))


@contextlib.contextmanager
def refusing(
    source: str, *, kind: str, advice: str = "it is damaged, fetch it again"
) -> Iterator[None]:
    """Turns whatever the code inside raises about a file into one sentence.

    For the outermost call of a reader: the libraries that parse what somebody else wrote raise
    nearly every type there is. Panics of Rust are no `Exception`. What is never about a file goes
    through: a closed pipe under the progress, a name that the code does not have.
    """
    try:
        yield
    except (InputError, BrokenPipeError, NameError):
        raise
    except MemoryError as error:
        raise InputError(
            f"{source} asks for more memory than this machine has; if the {kind} is not that "
            f"large, the file is damaged: fetch it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{source} could not be read ({error}); check that it is there and may be read"
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {error}".strip(": ")[:REASON_CHARS]
        raise InputError(f"{source} could not be read as a {kind} ({reason}); {advice}") from error
