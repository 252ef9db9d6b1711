"""The `[parallel]` table of a run's configuration."""

from typing import Annotated

import msgspec
from msgspec import Meta


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the processes of a run share out besides the samples of a global batch."""

    # so many processes of a host train one sample together, each on an equal part of its tokens;
    # for samples that one card has no room for, or where a step must be short. 1: none do
    sequence: Annotated[int, Meta(ge=1)] = 1
