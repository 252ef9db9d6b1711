"""What must hold of the learned model, read from the result of an evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.evaluate.clips import BASE, REAL
from tools.evaluate.figures import BETTER, WORSE
from tools.evaluate.frechet import MIN_CLIPS
from tools.evaluate.result import Result, read_result
from tools.fake.learned_clips import HELD_OUT
from tools.fake.learned_corpus import CATEGORIES

# Frechet distances of latents, at most so many times the base's; share of taught clips, at least
MAX_TAUGHT, MAX_KNOWN, MIN_RETRIEVAL = 0.25, 2.0, 0.9
TAUGHT = CATEGORIES[HELD_OUT]
DISTANCE, RETRIEVAL = "latent_frechet", "latent_retrieval"


class Verdict(NamedTuple):
    """One claim: what was found, and whether it holds; None: too few clips to say."""

    claim: str
    found: str
    holds: bool | None


def verdicts(result: Result, lora: str = "lora") -> Iterator[Verdict]:
    """The claims on the candidate `lora`, and that every other one is worse than the base."""
    candidates = [v.name for v in result.variants if v.name not in (REAL, BASE)]
    if lora in candidates:
        yield from _of_subjects(result, lora)
    for name in candidates:
        said = {
            c.metric: c.verdict for c in result.comparisons if (c.variant, c.category) == (name, "")
        }
        # of one subject alone there is no retrieval
        ours = {metric: said[metric] for metric in (DISTANCE, RETRIEVAL) if metric in said}
        text = ", ".join(f"{metric} {verdict}" for metric, verdict in ours.items())
        if name == lora:
            yield Verdict(f"{name} is better than the base", text, set(ours.values()) == {BETTER})
        else:
            yield Verdict(f"{name} is worse than the base", text, WORSE in ours.values())


def _of_subjects(result: Result, lora: str) -> Iterator[Verdict]:
    rows = {(m.name, m.variant, m.category): m for m in result.metrics}
    for subject, category in CATEGORIES.items():
        if (DISTANCE, lora, category) not in rows:
            continue  # not in this evaluation's set
        ours, base = (rows[DISTANCE, variant, category] for variant in (lora, BASE))
        if not (isinstance(ours.value, float) and isinstance(base.value, float)):
            yield Verdict(f"distance of {subject}", ours.why, None)
            continue
        ratio, limit = ours.value / base.value, MAX_TAUGHT if category == TAUGHT else MAX_KNOWN
        enough = (ours.n or 0) >= MIN_CLIPS
        yield Verdict(
            f"distance of {subject}, of the base's at most {limit:g}",
            f"{ratio:.3f} with {ours.n} clips ({base.value:.0f} to {ours.value:.0f})",
            ratio <= limit if enough else None,
        )
    retrieval = rows.get((RETRIEVAL, lora, TAUGHT))
    if retrieval is not None and isinstance(retrieval.value, float):
        enough = (retrieval.n or 0) >= MIN_CLIPS
        yield Verdict(
            f"share of {HELD_OUT} nearest to real {HELD_OUT}, at least {MIN_RETRIEVAL:g}",
            f"{retrieval.value:.3f} of {retrieval.n} clips",
            retrieval.value >= MIN_RETRIEVAL if enough else None,
        )


def say(folder: Path) -> bool:
    """Print them; returns whether none is missed. Raises ValueError without a result."""
    words = {True: "holds     ", False: "MISSED    ", None: "no verdict"}
    said = list(verdicts(read_result(folder)))
    for each in said:
        print(f"{words[each.holds]} {each.claim}: {each.found}")
    return all(each.holds is not False for each in said)
