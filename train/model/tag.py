"""Names for the expensive operations of a block, so that the activation plan can tell them apart.

    with tagged("attn1.qkv"):
        y = F.linear(x, weight, bias)

The policy of torch.utils.checkpoint (train/activations/runner.py) sees every operation of a block
twice, in the forward pass and when that is recomputed, and each time asks `current_tag()`. Autograd
recomputes in a thread of its own, so the name is kept per thread.
"""

from contextvars import ContextVar

_tag: ContextVar[str] = ContextVar("tag", default="")


class tagged:
    """Operations inside of the `with` block have this name. A class, because a generator with
    contextlib takes four times as long, and a pass enters hundreds of these.
    """

    __slots__ = ("_name", "_token")

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        self._token = _tag.set(self._name)

    def __exit__(self, *_: object) -> None:
        _tag.reset(self._token)


def current_tag() -> str:
    """The innermost name in this thread; empty outside of `tagged`."""
    return _tag.get()
