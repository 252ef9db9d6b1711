"""Names for the expensive operations of a block, so that the activation plan can tell them apart.

    with tagged("attn1.qkv"):
        y = F.linear(x, weight, bias)

The policy of torch.utils.checkpoint (train/activations/runner.py) sees every operation of a block
twice, in the forward pass and when that is recomputed, and each time asks `current_tag()`. Autograd
recomputes in a thread of its own, so the name is kept per thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tag: ContextVar[str] = ContextVar("tag", default="")


@contextmanager
def tagged(name: str) -> Iterator[None]:
    token = _tag.set(name)
    try:
        yield
    finally:
        _tag.reset(token)


def current_tag() -> str:
    """The innermost name in this thread; empty outside of `tagged`."""
    return _tag.get()
