"""On which side of the split a clip stands, by its programme. Pure functions."""

from collections.abc import Sequence

import xxhash


def programme_group(station: str, date: str, clip_id: str, group_by: Sequence[str]) -> str:
    """The programme that a clip probably comes from: clips of one group never stand on both sides
    of the split.
    """
    neighbourhood = str(int(clip_id) // 100) if clip_id.isascii() and clip_id.isdigit() else clip_id
    parts = {"station": station, "date": date, "neighbourhood": neighbourhood}
    return "/".join(parts[name] for name in group_by)


def split_of(group: str, seed: int, val_share: float) -> str:
    """ "val" for about `val_share` of all groups, by hash: what is added later moves nothing."""
    # The hash is uniform over 64 bits: its share of that range is a draw from [0, 1).
    draw = xxhash.xxh3_64_intdigest(f"{seed}/{group}".encode())
    return "val" if draw < val_share * 2**64 else "train"
