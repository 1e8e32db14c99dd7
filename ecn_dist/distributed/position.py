"""Where this rank is, for the error of whoever misses it."""


class Position:
    """The newest collective this rank takes part in, and the training step. Cheap to write, at every collective."""

    def __init__(self) -> None:
        self.collective = "the start"
        self.count = 0  # of collectives: the same on all ranks that are equally far
        self.step: int | None = None

    def __str__(self) -> str:
        return self.collective if self.step is None else f"{self.collective} at step {self.step}"


position = Position()


def entering(collective: str) -> None:
    """Note the collective that comes next. For those that run outside `collectives`, such as a gradient exchange."""
    position.collective = collective
    position.count += 1


def at_step(step: int) -> None:
    """Note the training step that begins."""
    position.step = step
