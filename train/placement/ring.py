"""Two slots on the card that the weights of many blocks pass through, one block ahead of the
computation.

A place is a block's number among those whose weights pass through the ring. Place p always comes
to slot p % 2, so what reads it has one address. A pass goes forward 0, 1, ... and back again; the
two that end the forward pass begin the backward pass and are there already, and so are the two
that end the backward pass.

    use(p): wait for p;  begin to fill the other slot with what comes next

The other slot may be filled then: what has read it was started before, and the copy waits for it.
Wrong guesses of what comes next cost time, never the result: `use` fills what isn't there.

Autograd runs a block's nodes before those of the blocks before it, because they are younger, so
this holds in the backward pass too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from train.activations.offload import CopyStream

NUM_SLOTS = 2


class Ring:
    """fill(place, slot) starts to fill the slot, a flat tensor, on the current stream."""

    def __init__(
        self, slots: Sequence[Tensor], fill: Callable[[int, Tensor], None], copies: CopyStream
    ):
        self.slots = slots
        self._source, self._copies = fill, copies
        # what each slot holds or is filled with, and the event of that
        self._places: list[int | None] = [None] * len(slots)
        self._filled: list[Any] = [None] * len(slots)

    def use(self, place: int, then: int | None) -> None:
        """What is started from now on may read `place`; `then` comes next (None: it is there, or
        not known).
        """
        slot = self.slot_of(place)
        if self._places[slot] != place:
            self._fill(place)
        self._copies.wait_for(self._filled[slot])
        # the slot that is in use is not filled
        if then is not None and self.slot_of(then) != slot and then not in self._places:
            self._fill(then)

    def slot_of(self, place: int) -> int:
        return place % len(self.slots)

    def _fill(self, place: int) -> None:
        slot = self.slot_of(place)
        self._places[slot] = place
        self._filled[slot] = self._copies.run(lambda: self._source(place, self.slots[slot]))


def next_place(
    place: int, before: int | None, num_places: int, first_trained: int, trains: bool
) -> int | None:
    """The place that is needed after `place`, which came after `before`; None: nothing new.

    trains: gradients are enabled, so a backward pass follows, down to `first_trained`.
    """
    goes_back = trains and before is not None and place in (before, before - 1)
    if goes_back:
        # the next forward pass begins at 0
        return place - 1 if place > first_trained else 0
    if place + 1 < num_places:
        return place + 1
    return None if trains else 0
