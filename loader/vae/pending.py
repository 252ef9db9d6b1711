"""What stands between two convolutions of the encoder, as values: a sum that is not computed yet.

Shapes: B batch, T frames, H height, W width, C channels (last, dense).
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

NORM_EPS = 1e-24


class Stream(NamedTuple):
    """Activations that later layers read again: x_BTHWC + bias_C."""

    x_BTHWC: Tensor
    bias_C: Tensor | None


class GroupMean(NamedTuple):
    """The shortcut of a DownBlock: means over groups of a stream's neighbours (`group_mean`)."""

    source: Stream
    time_factor: int
    space_factor: int


@dataclass
class Pending:
    """A sum that isn't computed yet: x + bias + residual + shortcut, each where it is given.

    Nobody else may use `x_BTHWC`: `finish` can store the sum in its place.
    """

    x_BTHWC: Tensor
    bias_C: Tensor | None = None
    residual_BTHWC: Tensor | None = None
    shortcut: GroupMean | None = None

    @property
    def is_biased_only(self) -> bool:
        return self.residual_BTHWC is None and self.shortcut is None

    def clear(self) -> None:
        """Give the tensors up. Callers up the stack still hold this object, and so their memory."""
        del self.x_BTHWC, self.bias_C, self.residual_BTHWC, self.shortcut
