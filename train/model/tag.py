"""Names for the expensive operations of a block, so that the activation plan can tell them apart.

    with tagged("attn1.qkv"):
        y = F.linear(x, weight, bias)

train/activations/runner.py runs a block inside of `watching`, in the forward pass and when that is
recomputed, and so is asked for each name what is to be entered with it. Autograd recomputes in a
thread of its own, so who is asked is kept per thread.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any

# name -> what is entered with it, None for nothing
Watch = Callable[[str], AbstractContextManager[Any] | None]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


class tagged:
    """Operations inside of the `with` block have this name. A class, because a generator with
    contextlib takes four times as long, and a pass enters hundreds of these.
    """

    __slots__ = ("_entered", "_name")

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        watch = _watch.get()
        self._entered = None if watch is None else watch(self._name)
        if self._entered is not None:
            self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._entered is not None:
            self._entered.__exit__(*error)


class watching:
    """In this thread each name inside of the `with` block is asked of `watch`."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def __enter__(self) -> None:
        self._token: Token[Watch | None] = _watch.set(self._watch)

    def __exit__(self, *_: object) -> None:
        _watch.reset(self._token)
