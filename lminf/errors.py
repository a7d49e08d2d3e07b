"""The one exception that means: the input was bad and the message says what to do about it."""


def printable(text: str) -> str:
    """The text with characters that a terminal would act on, such as escape, written as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class InputError(ValueError):
    """One sentence: what was wrong, what was found, what to do. Commands exit with 2 on it."""
