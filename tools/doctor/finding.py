"""One line of the doctor's answer."""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

Status = Literal["ok", "warning", "failure", "skipped"]


class Finding(msgspec.Struct, frozen=True):
    """`advice` says what to do; it is empty only where nothing is to be done."""

    name: str
    status: Status
    text: str
    advice: str = ""


Check = Callable[[], Iterator[Finding]]


def guarded(name: str, check: Check) -> Iterator[Finding]:
    """The findings of `check`. An exception becomes a failure: the other checks still run, and a
    doctor that stops at the first fault would have to be called once per fault.
    """
    try:
        yield from check()
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding(name, "failure", text, "the check itself broke off: mend this first")
