"""Which stretches of which clips become samples, on which side of the split, in which shard. Pure functions."""

import msgspec


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One sample to be: a stretch of one shot. `start_ms` counts from the clip's first frame; fps is the target's."""

    key: str
    label: str
    clip_id: str
    media_type: str
    category: str
    programme: str
    split: str
    shot: int
    start_ms: int
    fps: float
    prompt: str
    bucket: str
    media_xxh3: str
    flags: tuple[str, ...] = ()


class ShardPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of one shard, decided before anything is encoded. Keys ascend."""

    name: str
    split: str
    bucket: str
    windows: list[Window]
