"""An exponential moving average of all LoRA parameters (EMA), beside the ones that are trained.

    average = Average(vector, decay)
    average.update(vector, num_done)         after every optimizer step
    with average.shown(vector, refresh):     the adapters hold the average
        ...

It is what a run that has one validates, samples and exports; what is trained stays untouched. The
decay begins low, (1 + n) / (10 + n) after n updates, so that the first steps, which are far from
the end, are soon forgotten (as in diffusers' EMAModel and TensorFlow's ExponentialMovingAverage).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor


class Average:
    """float32, one value per parameter, on their device."""

    def __init__(self, vector: Tensor, decay: float):
        self._decay = decay
        self.vector = vector.detach().clone()

    def update(self, vector: Tensor, num_done: int) -> None:
        """Take in the parameters after `num_done` steps. Does not wait for the device."""
        self.vector.lerp_(vector.detach(), 1.0 - decay_after(num_done, self._decay))

    @contextmanager
    def shown(self, vector: Tensor, refresh: Callable[[], None]) -> Iterator[None]:
        """`vector` holds the average as long as the block runs, and then its own bits again.
        refresh(): renews what is derived of it.
        """
        trained = vector.detach().clone()
        vector.data.copy_(self.vector)
        refresh()
        try:
            yield
        finally:
            vector.data.copy_(trained)
            refresh()


def decay_after(num_done: int, decay: float) -> float:
    """What is left of the average before step `num_done`, counted from 1, when that is taken in."""
    num_before = num_done - 1
    return min(decay, (1 + num_before) / (10 + num_before)) if num_before else 0.0
