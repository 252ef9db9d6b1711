"""Save the outputs of the planned operations of a block in its forward pass, and put them in the
place of the operations when it is recomputed.

torch's create_selective_checkpoint_contexts gives the same result by a dispatch mode around the
whole block. Each operation in it then goes through Python, views and allocations too, and where a
GPU's part of a step is short, it waits for the host. So here a mode is entered only inside the tags
(train/model/tag.py) whose outputs are saved; figures in bench/records/2026-11-28_host_time.md.
"""

from collections import defaultdict, deque
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.model.attention import OPERATIONS as ATTENTION_OPERATIONS
from train.model.tag import watching
from train.parallel.sequence import EXCHANGES

# what a tag may name: other operations inside of it, as views, cost nothing
SAVEABLE_OPERATIONS = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default} | (
    ATTENTION_OPERATIONS
)


class _Part(NamedTuple):
    """Of an operation's output."""

    value: Any
    version: int | None  # of a tensor


# of one block, by the operation and in the order of its calls
_Outputs = defaultdict[Any, deque[list[_Part]]]


class _Saving(TorchDispatchMode):
    def __init__(self, operations: frozenset[Any], outputs: _Outputs):
        super().__init__()
        self._operations, self._outputs = operations, outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._operations:
            parts = out if isinstance(out, tuple) else (out,)
            self._outputs[func].append([_part(value) for value in parts])
        return out


class _Recalling(TorchDispatchMode):
    def __init__(self, operations: frozenset[Any], outputs: _Outputs):
        super().__init__()
        self._operations, self._outputs = operations, outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._operations:
            return func(*args, **(kwargs or {}))
        assert self._outputs[func], f"{func} is recomputed once more than it has run"
        parts = self._outputs[func].popleft()
        for value, version in parts:
            assert version is None or value._version == version, f"{func}: its output was changed"
        return tuple(value for value, _ in parts) if len(parts) > 1 else parts[0].value


def _part(value: Any) -> _Part:
    if not isinstance(value, Tensor):
        return _Part(value, None)
    # autograd is about to put `value` into its graph, which must not be held by what is saved
    # here. Below autograd `detach` counts versions apart unless it is told not to
    guard = torch._C._SetExcludeDispatchKeyGuard
    with guard(torch._C.DispatchKey.ADInplaceOrView, False):
        value = value.detach()
    return _Part(value, value._version)


@cache
def _operations(name: str, saved: frozenset[str]) -> frozenset[Any]:
    """Whose outputs are saved inside of the tag `name`."""
    own = SAVEABLE_OPERATIONS if name in saved else set()
    # exchanges are inside of what is tagged as attention
    exchanges = {op for op, tag in EXCHANGES.items() if tag in saved and tag.startswith(f"{name}.")}
    return frozenset(own | exchanges)


def contexts(saved: frozenset[str]) -> tuple[watching, watching]:
    """The context managers of one checkpoint call: its forward pass and its recomputation, of which
    there is one.
    """
    outputs: _Outputs = defaultdict(deque)

    def watch(mode: type[_Saving | _Recalling], name: str) -> TorchDispatchMode | None:
        operations = _operations(name, saved)
        return mode(operations, outputs) if operations else None

    return watching(partial(watch, _Saving)), watching(partial(watch, _Recalling))
