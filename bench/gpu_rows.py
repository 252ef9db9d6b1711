"""Rows of bench.loader_gpu: a figure, and where there is an aim whether it was met."""

from typing import NamedTuple

import torch

DEVICE = torch.device("cuda", 0)


class Row(NamedTuple):
    what: str
    value: float
    unit: str
    aim: str = ""
    met: bool | None = None


def at_most(what: str, value: float, unit: str, limit: float) -> Row:
    return Row(what, value, unit, f"at most {limit:g}", value <= limit)
