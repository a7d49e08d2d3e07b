"""Values over time, smoothed for the eye."""


class Smoothed:
    """Exponential average whose start is unbiased: the mean of the values seen, weighted to recent.

    A value's weight halves every `half_life` values.
    """

    def __init__(self, half_life: float):
        self.decay = 0.5 ** (1 / half_life)
        self.total = self.weight = 0.0

    def add(self, value: float) -> float:
        self.total = self.decay * self.total + value
        self.weight = self.decay * self.weight + 1.0
        return self.total / self.weight
