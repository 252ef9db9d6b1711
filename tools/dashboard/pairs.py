"""Which pairs of clips a rater is asked about, in which order, which side is which. Pure functions.

A pair is two variants' clips of one prompt and seed. Its name, the sides and the order are hashes,
so neither the page nor a URL says which variant is shown. Pairs that all raters share come first;
the rest comes in an order of each rater's own. A fifth is asked twice, with the sides swapped: how
often a rater then says the same is what their votes are worth.
"""

import hmac
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from tools.evaluate.result import Result, ResultClip

QUESTIONS = ("overall", "text")
SHARED_SHARE, REPEATED_SHARE = 0.3, 0.2
REAL = "real"


class Pair(NamedTuple):
    """One question's two clips as a rater sees them. `name` is the pair's, the same for all raters
    and both times; `token` is this showing's.
    """

    name: str
    token: str
    repeated: bool
    prompt_id: str
    prompt: str
    category: str
    seed: int
    left: ResultClip
    right: ResultClip


def pairs_of(result: Result, rater: str, secret: bytes, result_hash: str) -> list[Pair]:
    """All pairs of a rater, in the order in which they are asked. The real clips are no variant."""

    def draw(*parts: str) -> float:
        text = "\0".join((result_hash, *parts))
        return int.from_bytes(hmac.digest(secret, text.encode(), "sha256")[:6]) / 2**48

    def token(*parts: str) -> str:
        text = "\0".join((result_hash, *parts))
        return hmac.new(secret, text.encode(), "sha256").hexdigest()[:20]

    first: list[tuple[float, Pair]] = []
    again: list[tuple[float, Pair]] = []
    for one, other in _couples(result.clips):
        parts = (one.prompt_id or one.prompt, str(one.seed), one.variant, other.variant)
        name = token("pair", *parts)
        left, right = (one, other) if draw("side", rater, name) < 0.5 else (other, one)
        shared = draw("shared", name) < SHARED_SHARE
        # what is shared comes first, in each rater's own order too
        place = draw("order", rater, name) + (0.0 if shared else 1.0)
        pair = Pair(
            name=name,
            token=token("shown", rater, name),
            repeated=False,
            prompt_id=parts[0],
            prompt=one.prompt,
            category=one.category,
            seed=one.seed,
            left=left,
            right=right,
        )
        first.append((place, pair))
        if draw("repeated", name) < REPEATED_SHARE:
            swapped = pair._replace(
                token=token("again", rater, name), repeated=True, left=right, right=left
            )
            again.append((place, swapped))
    return [pair for _, pair in (*sorted(first), *sorted(again))]


def _couples(clips: Sequence[ResultClip]) -> list[tuple[ResultClip, ResultClip]]:
    """Two clips of different variants with the same prompt and seed, by prompt, seed, variants."""
    groups: dict[tuple[str, int], dict[str, ResultClip]] = {}
    for clip in clips:
        if clip.variant != REAL:
            place = groups.setdefault((clip.prompt_id or clip.prompt, clip.seed), {})
            place.setdefault(clip.variant, clip)
    return [
        (group[one], group[other])
        for _, group in sorted(groups.items())
        for one, other in combinations(sorted(group), 2)
    ]
