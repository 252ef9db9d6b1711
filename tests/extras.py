"""Marks for tests of what an extra brings: skipped, with the reason, where it is not installed."""

from importlib.util import find_spec

import pytest


def _is_there(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or _is_there(parent)) and find_spec(name) is not None


needs_dali = pytest.mark.skipif(
    not _is_there("nvidia.dali"), reason="DALI is not installed: the extra dali-cuda12"
)
needs_ray = pytest.mark.skipif(not _is_there("ray"), reason="Ray is not installed: the extra ray")
