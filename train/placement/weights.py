"""A model some of whose blocks have their GEMM weights elsewhere: only in a ring of two slots on
the card (ring.py) while they are read.

    weights = MovedWeights(blocks, layouts, source, device, dtype)
    model = load_transformer(..., elsewhere=weights)     or weights.take(model)
    adapters = attach(model, ...)
    weights.start(model, adapters)

The parameters of such a block are views of its slot, whose address never changes, so neither the
layers nor autograd know of the ring. What fills the slots is brought up to date by a hook before
the block runs: every pass through a block, recomputation included, goes through `Module.__call__`.
B's columns of [W | B] change with every step; they are kept on the card and written behind W
there (LoRAProjections.write_columns).

Each block has to run under a checkpoint wherever a gradient is needed: what autograd saves of it
must not outlive its turn in the ring.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.activations.offload import CopyStream
from train.lora.adapters import LoRA, LoRAProjections
from train.model.wan import Wan
from train.placement.layout import BlockLayout, Matrix
from train.placement.ring import NUM_SLOTS, Ring, next_place


class Source(Protocol):
    """Where the weights of the moved blocks are kept; by place, their number among these."""

    @property
    def loads(self) -> bool:
        """Whether this process loads the weights; if not, another one does."""

    def slot_elements(self, place: int) -> int:
        """What `fill` writes of a slot."""

    def keep(self, place: int, slot: Tensor) -> None:
        """Take what was loaded to the slot."""

    def loaded(self) -> None:
        """All are kept: called on every process, all together."""

    def fill(self, place: int, slot: Tensor) -> None:
        """Start to copy the weights of `place` to the slot, on the current stream."""

    @property
    def couples(self) -> bool:
        """Whether processes have to pass through the model together."""

    def any_passes(self, passes: bool) -> bool:
        """Whether any process `passes` now; asked by all together, where it `couples` them."""

    def describe(self) -> str:
        """For the log: where they are."""


class MovedWeights:
    """See above. blocks: whose weights are moved, ascending; `layouts` has one for each."""

    def __init__(
        self,
        blocks: Sequence[int],
        layouts: Mapping[int, BlockLayout],
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        copies: CopyStream | None = None,
    ):
        self.blocks, self._source = tuple(blocks), source
        size = max(source.slot_elements(place) for place in range(len(blocks)))
        # zeros: the padding of rows is kept and copied with them
        slots = [
            torch.zeros(size, device=device, dtype=dtype)
            for _ in range(min(NUM_SLOTS, len(blocks)))
        ]
        self.ring = Ring(slots, source.fill, copies or CopyStream(device))
        # the place that was used last, and the one that is being loaded
        self._last: int | None = None
        self._loading: int | None = None
        self._first_trained = 0
        self._is_uneven = False
        self._matrices: dict[str, tuple[int, Matrix]] = {}
        for place, index in enumerate(self.blocks):
            for matrix in layouts[index].matrices:
                self._matrices[f"blocks.{index}.{matrix.name}"] = (place, matrix)

    @property
    def couples(self) -> bool:
        """Whether processes have to pass through the model together."""
        return self._source.couples

    @property
    def slots_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.ring.slots)

    # -- for train.model.load -----------------------------------------------------------------

    def holds(self, name: str) -> bool:
        """Whether this parameter of the model is one of those moved."""
        return name in self._matrices

    def target(self, name: str) -> Tensor | None:
        """Where it is to be loaded to, one block after another; None: another process does that."""
        if not self._source.loads:
            return None
        place, _ = self._matrices[name]
        if place != self._loading:
            self._keep_loaded()
            self._loading = place
        return self.parameter(name)

    def _keep_loaded(self) -> None:
        if self._loading is not None:
            self._source.keep(self._loading, self._slot(self._loading))
        self._loading = None

    def _slot(self, place: int) -> Tensor:
        return self.ring.slots[self.ring.slot_of(place)]

    def parameter(self, name: str) -> Tensor:
        """What the model has instead: a view of the slot."""
        place, matrix = self._matrices[name]
        return matrix.view(self._slot(place))

    def take(self, model: Wan) -> None:
        """Move the weights of a model that has them on a device."""
        for name, parameter in list(model.named_parameters()):
            if not self.holds(name):
                continue
            target = self.target(name)
            if target is not None:
                target.copy_(parameter.data)
            path, _, last = name.rpartition(".")
            moved = nn.Parameter(self.parameter(name), requires_grad=False)
            setattr(model.get_submodule(path), last, moved)

    def all_parameters(self, model: Wan) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by name, the moved ones while their slot holds them: a view of it
        is right until the next one is asked for. After `start`.
        """
        for name, parameter in model.named_parameters():
            if name in self._matrices:
                place, _ = self._matrices[name]
                with torch.no_grad():
                    self._bring(place)
            yield name, parameter

    # -- for each pass ------------------------------------------------------------------------

    def start(self, model: Wan, adapters: LoRA) -> None:
        """Have the weights come to the slots from now on, before each of these blocks runs. All are
        loaded, on every process.
        """
        self._keep_loaded()
        self._source.loaded()
        trained = [
            place for place, index in enumerate(self.blocks) if index >= adapters.first_block
        ]
        self._first_trained = trained[0] if trained else len(self.blocks)
        for place, index in enumerate(self.blocks):
            before = partial(self._before, place, adapters.modules.get(index, []))
            model.blocks[index].register_forward_pre_hook(before)

    def _before(
        self, place: int, adapters: Sequence[LoRAProjections], _block: nn.Module, _inputs: Any
    ) -> None:
        """The hook of a block."""
        if place == 0 and self._is_uneven:
            self._source.any_passes(True)
        self._bring(place)
        with torch.no_grad():
            for each in adapters:
                each.write_columns()

    def _bring(self, place: int) -> None:
        """Have the weights of `place` in its slot, and what comes next on its way."""
        trains = torch.is_grad_enabled()
        then = next_place(place, self._last, len(self.blocks), self._first_trained, trains)
        self._last = place
        with torch.no_grad():
            self.ring.use(place, then)

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """For forward passes without gradients, of which processes may make different numbers:
        where they have to pass together, those that are done go on bringing weights until all are.
        Entered and left by all; nothing else that they do together happens inside.
        """
        self._is_uneven = self._source.couples
        try:
            yield
            while self._is_uneven and self._source.any_passes(False):
                with torch.no_grad():
                    for place in range(len(self.blocks)):
                        self._bring(place)
        finally:
            self._is_uneven = False

    def describe(self) -> str:
        gib = 2**30
        return (
            f"the weights of {len(self.blocks)} blocks {self._source.describe()} and come to the "
            f"card by turns, {self.slots_bytes / gib:.1f} GiB at a time; CUDA graphs are off"
        )
