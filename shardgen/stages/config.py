"""The configuration of the stages: where labels and media come from. None of it decides a byte of
a shard, so none of it is part of the recipe.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

# What would fail late, or do something else in silence, is refused at the start.
PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0, lt=1e6)]


class LabelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the labels lie and which of them to take."""

    # folder of label files, read recursively, never written
    root: Annotated[str, Meta(min_length=1)]
    limit: NonNegativeInt = 0  # take the first N label files in path order; 0: all
    # take this share, chosen by a hash of the clip id
    sample_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_bytes: PositiveInt = 1 << 20  # a larger label file is refused unread
    workers: NonNegativeInt = 0  # parser processes; 0: one per CPU
    # exclusions.csv of the people who looked at the clips; empty: none. Excluded labels give no
    # new samples
    exclusions: str = ""


class FetchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Media lie beside their label or behind its URL. Local files are read in place, never
    copied.
    """

    schemes: tuple[Literal["http", "https"], ...] = ("https", "http")
    cache: str = ""  # folder for downloaded media; empty: OUTPUT/cache
    cache_limit_gib: PositiveFloat = 500.0
    workers: PositiveInt = 16  # files in flight, hashing local ones included
    per_host: PositiveInt = 8
    timeout_s: PositiveFloat = 30.0
    retries: Annotated[int, Meta(ge=0, le=100)] = 4
    # before the first retry; doubled each time, with jitter
    backoff_s: Annotated[float, Meta(ge=0, le=3600)] = 0.5
    # output folder of another build: what that has downloaded, hashed and probed is not done again
    reuse: str = ""
    ask_again: bool = False  # ask also for what a server refused before (404, 403)
    max_file_gib: PositiveFloat = 8.0
