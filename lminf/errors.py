"""The one exception that means: the input was bad and the message says what to do about it."""


class InputError(ValueError):
    """One sentence: what was wrong, what was found, what to do. Commands exit with 2 on it."""
