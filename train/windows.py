"""Which samples of a split are looked at again and again: the windows of validation and samples.

They are a pure function of (the split, the number asked for, a seed): keys decide, never ranks or
the order on the disk.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from loader.shuffle import hash64
from loader.walk import Walk, WalkPlace

# Metadata of at most so many samples are read per window asked for: a split of a million windows
# has enough programmes in any part of it.
CANDIDATES_PER_WINDOW = 64
PER_PROGRAMME = 2


class Window(NamedTuple):
    """A sample, and what is known of it without its tensors."""

    key: str
    category: str
    programme: str
    prompt: str
    place: WalkPlace


def choose_windows(
    walk: Walk, num_windows: int, seed: int, places: Sequence[WalkPlace] | None = None
) -> list[Window]:
    """At most `num_windows` of the split or of these `places` of it, see `spread`; fewer where
    there are fewer.
    """
    hashed = sorted(
        walk.places if places is None else places, key=lambda place: hash64(seed, place.key)
    )
    candidates = hashed[: CANDIDATES_PER_WINDOW * num_windows]
    return spread([window_of(walk, place) for place in candidates], num_windows)


def window_of(walk: Walk, place: WalkPlace) -> Window:
    """The sample at `place`; reads its metadata."""
    meta = walk.meta(place)
    return Window(meta.key, meta.category, meta.programme, meta.prompt, place)


def spread(windows: Sequence[Window], num_windows: int) -> list[Window]:
    """`num_windows` of `windows`, the first ones first, returned in the order of their keys.

    At most two of one programme, whose pictures are alike, and the categories in turn, so that a
    rare one is heard as often as a common one.
    """
    by_category: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        by_category[window.category].append(window)
    queues = [iter(by_category[category]) for category in sorted(by_category)]
    chosen: list[Window] = []
    used: Counter[str] = Counter()
    while queues and len(chosen) < num_windows:
        for queue in list(queues):
            free = next((w for w in queue if used[w.programme] < PER_PROGRAMME), None)
            if free is None:
                queues.remove(queue)
                continue
            used[free.programme] += 1
            chosen.append(free)
            if len(chosen) == num_windows:
                break
    return sorted(chosen)
