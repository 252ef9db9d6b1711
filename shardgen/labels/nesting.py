"""How deep a label file may nest. A limit of our own, because what a JSON decoder takes before it
gives up depends on the version of Python.
"""

import re

MAX_DEPTH = 200  # of objects and arrays; real labels have eight
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[][{}]")


def is_too_deep(data: bytes) -> bool:
    """Whether objects and arrays are nested more than MAX_DEPTH deep."""
    # nearly no label has so many brackets at all, and counting them costs a microsecond
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", data)):
        depth += 1 if bracket in (b"[", b"{") else -1
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH
