"""The stage that judges labels: ingested -> wanted, or rejected by a rule, or skipped by limit and
sample_fraction. Nothing but the label is looked at, so no footage is fetched for what a rule
refuses anyway.
"""

from collections.abc import Callable, Set

import xxhash

from shardgen.catalog.catalog import Catalog, LabelScores
from shardgen.catalog.rows import Clip
from shardgen.catalog.tables import (
    ACCEPTED,
    DUPLICATE,
    EXCLUDED,
    FETCHED,
    INGESTED,
    REJECTED,
    REPEATED_ID,
    SKIPPED,
    SOUND,
    UNAVAILABLE,
    WANTED,
    Outcome,
)
from shardgen.labels.parse import Label
from shardgen.rules.config import RulesConfig
from shardgen.rules.prompt import clip_prompt
from shardgen.rules.quality import Scores, Verdict, judge_label, score_caption
from shardgen.rules.shots import PlanError, shots_of
from shardgen.rules.split import programme_group
from shardgen.stages.config import LabelsConfig
from shardgen.stages.verdict import outcome_of

# judged already, and not planned
_FURTHER = (WANTED, FETCHED, SOUND, UNAVAILABLE, DUPLICATE)


def filter_labels(
    catalog: Catalog,
    labels: LabelsConfig,
    rules: RulesConfig,
    excluded: Set[str],
    advance: Callable[[int], None],
) -> None:
    """ingested -> wanted, or rejected by a reviewer (`excluded`, relative paths of labels) or a
    label rule, or skipped by limit and sample_fraction.
    """
    repeated = _repeated(catalog, excluded)
    chosen = set(catalog.first_labels(labels.limit)) if labels.limit else None
    for page in catalog.pages(INGESTED):
        outcomes, all_scores = [], []
        for clip in page:
            label = catalog.labels.read(clip.id)
            scores = score_caption(clip_prompt(label, clip.media_type, rules.prompt))
            group = programme_group(
                label.station, label.broadcast_date, label.clip_id, rules.split.group_by
            )
            all_scores.append(LabelScores(*scores, programme=group, id=clip.id))
            selected = chosen is None or clip.id in chosen
            if not selected or not _sampled(label.clip_id, labels.sample_fraction):
                outcomes.append(
                    Outcome(clip.id, SKIPPED, "not_selected", "outside limit or sample_fraction")
                )
            elif clip.label in excluded:
                detail = "a reviewer excluded it (labels.exclusions)"
                outcomes.append(Outcome(clip.id, REJECTED, EXCLUDED, detail))
            elif clip.id in repeated:
                outcomes.append(Outcome(clip.id, REJECTED, REPEATED_ID, repeated[clip.id]))
            else:
                verdict = _judge(clip, label, scores, rules)
                outcomes.append(
                    outcome_of(clip, WANTED, verdict, score_only=rules.filters.score_only)
                )
        catalog.record_scores(all_scores)
        catalog.record(outcomes)
        advance(len(page))


def _repeated(catalog: Catalog, excluded: Set[str]) -> dict[int, str]:
    """Row -> which label keeps its clip id, for every later label that claims the same one. A
    label that is excluded keeps no id, unless its samples are planned already.

    Labels and footage come and go: who was rejected for one that claims the id no more is judged
    anew, who had got further before the one that keeps it came, and who was a duplicate.
    """
    repeated: dict[int, str] = {}
    again = catalog.duplicates_of_none()
    for claims in catalog.repeated_ids():
        keeper, *others = [
            claim for claim in claims if claim.status == ACCEPTED or claim.label not in excluded
        ] or [claims[0]]
        for claim in others:
            repeated[claim.id] = f"{claim.clip_id} is also claimed by {keeper.label}"
            if claim.status in _FURTHER:
                again.append(claim.id)
    rejected = catalog.rejected_for_their_id()
    again += [clip for clip, detail in rejected.items() if repeated.get(clip) != detail]
    catalog.record([Outcome(clip, INGESTED) for clip in again])
    return repeated


def _sampled(clip_id: str, fraction: float) -> bool:
    # Uniform over 64 bits, and the same for an id in every build: a larger fraction only adds.
    return xxhash.xxh3_64_intdigest(f"sample/{clip_id}".encode()) < fraction * 2**64


def _judge(clip: Clip, label: Label, scores: Scores, rules: RulesConfig) -> Verdict | None:
    if verdict := judge_label(label, clip.media_type, scores, rules.filters):
        return verdict
    if not rules.windows.buckets_for(clip.media_type):
        return Verdict(
            "media_type_unwanted", f"windows.buckets has no shape for a {clip.media_type}"
        )
    if clip.media_type == "video" and rules.filters.wrong_timecodes == "reject":
        try:
            shots_of(label)
        except PlanError as error:
            return Verdict(error.reason, error.detail)
    return None
