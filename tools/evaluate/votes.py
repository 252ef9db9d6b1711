"""What people's votes about blind pairs say. Pure functions of votes; the page that asks, and which
pair is shown when and on which side, is the dashboard's (tools/dashboard/pairs.py).

A vote is left, right, same or unusable. A win counts 1, "same" a half for both; unusable pairs are
left out and counted.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tools.evaluate.intervals import MIN_PROMPTS, Interval, bootstrap, prompt_means, wilson


class Vote(NamedTuple):
    """One answer. `pair` names two variants' clips of one prompt and seed, for all raters; of a
    pair that is asked again, `repeated` is true and the sides are swapped.
    """

    pair: str
    question: str
    prompt: str
    left_variant: str
    right_variant: str
    answer: str
    repeated: bool
    rater: str

    @property
    def choice(self) -> str:
        """The variant that won, "same" or "unusable": what does not depend on the sides."""
        return {"left": self.left_variant, "right": self.right_variant}.get(
            self.answer, self.answer
        )


def votes_of_rows(rows: Iterable[Mapping[str, str]]) -> list[Vote]:
    """Votes of a CSV's rows, as the dashboard writes them. Raises ValueError for other columns."""
    votes = []
    for number, row in enumerate(rows, start=2):
        missing = [name for name in Vote._fields if name not in row]
        if missing or row["answer"] not in ("left", "right", "same", "unusable"):
            raise ValueError(
                f"line {number}: {missing or row['answer']!r}: not a CSV of votes that the "
                f"dashboard wrote"
            )
        fields = {name: row[name] for name in Vote._fields if name != "repeated"}
        votes.append(Vote(**fields, repeated=row["repeated"] in ("1", "True", "true")))
    return votes


class WinRate(NamedTuple):
    """How often `variant` wins over `against`: wins + ties / 2 of `n` usable votes.

    interval: by bootstrap over prompts. wilson: counts each vote as independent, so it holds where
    a rater votes once per prompt. advice: no verdict below MIN_PROMPTS prompts.
    """

    variant: str
    against: str
    n: int
    num_prompts: int
    num_unusable: int
    interval: Interval
    wilson: tuple[float, float]
    advice: str


def win_rate(votes: Sequence[Vote], variant: str, against: str, question: str) -> WinRate | None:
    """Of first showings; None without a usable vote."""
    pair = {variant, against}
    asked = [
        vote
        for vote in votes
        if {vote.left_variant, vote.right_variant} == pair
        and vote.question == question
        and not vote.repeated
    ]
    usable = [vote for vote in asked if vote.choice != "unusable"]
    if not usable:
        return None
    scores = [{variant: 1.0, against: 0.0}.get(vote.choice, 0.5) for vote in usable]
    by_prompt = prompt_means([vote.prompt for vote in usable], scores)
    interval = bootstrap([score - 0.5 for score in by_prompt.values()])
    low, high = interval.low + 0.5, interval.high + 0.5
    advice = "better" if low > 0.5 else "worse" if high < 0.5 else "not decided"
    if len(by_prompt) < MIN_PROMPTS:
        # all of a few votes may agree by chance, and then the interval has no width
        advice = f"no verdict below {MIN_PROMPTS} prompts,"
    return WinRate(
        variant=variant,
        against=against,
        n=len(usable),
        num_prompts=len(by_prompt),
        num_unusable=len(asked) - len(usable),
        interval=Interval(interval.value + 0.5, low, high, interval.p),
        wilson=wilson(sum(scores), len(usable)),
        advice=f"{advice} at {len(usable)} votes",
    )


def self_consistency(votes: Sequence[Vote]) -> tuple[float | None, int]:
    """(share of repeated pairs with the same choice, their number): what a rater's vote is worth.
    None without a repeated pair.
    """
    first = {(v.rater, v.pair, v.question): v.choice for v in votes if not v.repeated}
    again = [
        (vote.choice, first[place])
        for vote in votes
        if vote.repeated and (place := (vote.rater, vote.pair, vote.question)) in first
    ]
    if not again:
        return None, 0
    return sum(one == other for one, other in again) / len(again), len(again)


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Nominal alpha of `units`, the answers of several raters to one question each; units with
    fewer than two answers say nothing. None where nothing can disagree.
    """
    coincidences: dict[tuple[str, str], float] = defaultdict(float)
    for answers in units:
        if len(answers) < 2:
            continue
        for (i, one), (j, other) in combinations(enumerate(answers), 2):
            assert i != j
            for pair in ((one, other), (other, one)):
                coincidences[pair] += 1 / (len(answers) - 1)
    totals: Counter[str] = Counter()
    for (one, _), weight in coincidences.items():
        totals[one] += weight  # type: ignore[assignment]
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    if n <= 1 or expected == 0:
        return None
    observed = sum(weight for (one, other), weight in coincidences.items() if one != other)
    return 1 - (n - 1) * observed / expected


def agreement(votes: Sequence[Vote], question: str) -> tuple[float | None, float | None, int]:
    """(share of agreeing pairs of raters, Krippendorff's alpha, number of shared pairs)."""
    by_pair: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        if vote.question == question and not vote.repeated:
            by_pair[vote.pair].append(vote.choice)
    shared = [answers for answers in by_pair.values() if len(answers) > 1]
    pairs = [one == other for answers in shared for one, other in combinations(answers, 2)]
    share = sum(pairs) / len(pairs) if pairs else None
    return share, krippendorff_alpha(shared), len(shared)


def bradley_terry(votes: Sequence[Vote], question: str) -> dict[str, float]:
    """Variant -> log strength, their mean 0, by the MM algorithm; a tie is half a win for each.

    Raises ValueError for fewer than four variants (a win rate says it better), and where one has
    never won or never lost against the rest, so that no finite strength fits.
    """
    wins: dict[tuple[str, str], float] = defaultdict(float)
    for vote in votes:
        if vote.question != question or vote.repeated or vote.choice == "unusable":
            continue
        left, right = vote.left_variant, vote.right_variant
        share = {left: 1.0, right: 0.0}.get(vote.choice, 0.5)
        wins[left, right] += share
        wins[right, left] += 1 - share
    names = sorted({name for pair in wins for name in pair})
    if len(names) < 4:
        raise ValueError(f"{len(names)} variants: Bradley-Terry is for four or more")
    wins_VV = np.array([[wins[one, other] for other in names] for one in names])
    reach_VV = (wins_VV > 0) | np.eye(len(names), dtype=bool)
    for _ in names:  # who beats whom, over any number of others
        reach_VV = (reach_VV.astype(int) @ reach_VV.astype(int)) > 0
    if not reach_VV.all():
        raise ValueError("some variants never lost to the others: more votes are needed")
    played_VV, won_V = wins_VV + wins_VV.T, wins_VV.sum(1)
    strength_V = np.ones(len(names))
    for _ in range(10_000):
        pairs_VV = played_VV / (strength_V[:, None] + strength_V[None])
        new_V = won_V / pairs_VV.sum(1)
        new_V /= np.exp(np.log(new_V).mean())
        done = np.abs(np.log(new_V / strength_V)).max() < 1e-10
        strength_V = new_V
        if done:
            break
    return dict(zip(names, np.log(strength_V).tolist(), strict=True))
