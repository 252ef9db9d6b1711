"""What must hold of the learned model, read from the result of an evaluation."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tools.evaluate.clips import BASE, REAL
from tools.evaluate.figures import BETTER, TOO_FEW, WORSE
from tools.evaluate.frechet import MIN_CLIPS
from tools.evaluate.result import NOT_MEASURED, Result, read_result
from tools.fake.learned_clips import HELD_OUT
from tools.fake.learned_corpus import CATEGORIES

# Frechet distances of latents, at most so many times the base's; share of taught clips, at least
MAX_TAUGHT, MAX_KNOWN, MIN_RETRIEVAL = 0.25, 2.0, 0.9
TAUGHT = CATEGORIES[HELD_OUT]
DISTANCE, RETRIEVAL = "latent_frechet", "latent_retrieval"


class Verdict(NamedTuple):
    """One claim: what was found, and whether it holds. None: that can't be said, and `why`."""

    claim: str
    found: str
    holds: bool | None
    why: str = ""


def verdicts(result: Result, lora: str = "lora") -> Iterator[Verdict]:
    """The claims on the candidate `lora`, and that every other one is worse than the base."""
    said = {(c.metric, c.variant, c.category): c.verdict for c in result.comparisons}
    candidates = [v.name for v in result.variants if v.name not in (REAL, BASE)]
    if lora in candidates:
        yield from _of_subjects(result, said, lora)
    has_taught = any(metric.category == TAUGHT for metric in result.metrics)
    for name in candidates:
        if name == lora and not has_taught:
            continue  # it need not be better at what the base knows
        # of one subject alone there is no retrieval
        ours = {m: said[m, name, ""] for m in (DISTANCE, RETRIEVAL) if (m, name, "") in said}
        text = ", ".join(f"{metric} {verdict}" for metric, verdict in ours.items())
        found, wanted = set(ours.values()), BETTER if name == lora else WORSE
        # one that is wrong on purpose need not show in every figure
        holds = wanted in found if wanted == WORSE else found == {BETTER}
        claim = f"{name} is {wanted} than the base"
        if holds or not found <= {TOO_FEW, "", wanted}:
            yield Verdict(claim, text, holds)
            continue
        few = [metric for metric, verdict in ours.items() if verdict in (TOO_FEW, "")]
        why = f"too few clips or prompts for {' and '.join(few) or 'any figure'}"
        yield Verdict(claim, text, None, why)


def _of_subjects(
    result: Result, said: Mapping[tuple[str, str, str], str], lora: str
) -> Iterator[Verdict]:
    rows = {(m.name, m.variant, m.category): m for m in result.metrics}
    for subject, category in CATEGORIES.items():
        if (DISTANCE, lora, category) not in rows:
            continue  # not in this evaluation's set
        ours, base = (rows[DISTANCE, variant, category] for variant in (lora, BASE))
        if not (isinstance(ours.value, float) and isinstance(base.value, float)):
            yield Verdict(f"distance of {subject}", NOT_MEASURED, None, ours.why or base.why)
            continue
        ratio, limit = ours.value / base.value, MAX_TAUGHT if category == TAUGHT else MAX_KNOWN
        yield _judged(
            f"distance of {subject}, of the base's at most {limit:g}",
            f"{ratio:.3f} with {ours.n} clips ({base.value:.0f} to {ours.value:.0f})",
            ratio <= limit,
            ours.n or 0,
            # of real clips there may be fewer than of ours
            is_few=said.get((DISTANCE, lora, category)) == TOO_FEW,
        )
    retrieval = rows.get((RETRIEVAL, lora, TAUGHT))
    if retrieval is not None and isinstance(retrieval.value, float):
        yield _judged(
            f"share of {HELD_OUT} nearest to real {HELD_OUT}, at least {MIN_RETRIEVAL:g}",
            f"{retrieval.value:.3f} of {retrieval.n} clips",
            retrieval.value >= MIN_RETRIEVAL,
            retrieval.n or 0,
        )


def _judged(
    claim: str, found: str, is_met: bool, num_clips: int, *, is_few: bool = False
) -> Verdict:
    """Below MIN_CLIPS nothing is held, nor missed: `why` says how the figure stands by itself."""
    if num_clips >= MIN_CLIPS and not is_few:
        return Verdict(claim, found, is_met)
    side = "clips" if num_clips < MIN_CLIPS else "real clips"
    stands = "meets" if is_met else "does not meet"
    return Verdict(
        claim, found, None, f"fewer than {MIN_CLIPS} {side}; the figure by itself {stands} the bar"
    )


def say(folder: Path) -> bool:
    """Print them; returns whether something is held and nothing missed. Raises ValueError without a
    result.
    """
    words = {True: "holds     ", False: "MISSED    ", None: "not judged"}
    said = list(verdicts(read_result(folder)))
    for each in said:
        why = f" ({each.why})" if each.why else ""
        print(f"{words[each.holds]} {each.claim}: {each.found}{why}")
    count = Counter(each.holds for each in said)
    print(f"{count[True]} hold, {count[False]} missed, {count[None]} not judged")
    return count[True] > 0 and count[False] == 0
