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
    EXCLUDED,
    INGESTED,
    REJECTED,
    SKIPPED,
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
    keepers = _keepers(catalog, excluded)
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
            elif clip.id in keepers:
                detail = f"{label.clip_id} is also claimed by {keepers[clip.id]}"
                outcomes.append(Outcome(clip.id, REJECTED, "clip_id_repeated", detail))
            else:
                verdict = _judge(clip, label, scores, rules)
                outcomes.append(
                    outcome_of(clip, WANTED, verdict, score_only=rules.filters.score_only)
                )
        catalog.record_scores(all_scores)
        catalog.record(outcomes)
        advance(len(page))


def _keepers(catalog: Catalog, excluded: Set[str]) -> dict[int, str]:
    """Row -> the label that keeps its clip id, for every later label that claims the same one. A
    label that is excluded keeps no id, unless its samples are planned already.
    """
    keepers: dict[int, str] = {}
    for claims in catalog.repeated_ids():
        standing = [
            claim for claim in claims if claim.status == ACCEPTED or claim.label not in excluded
        ]
        keepers |= {claim.id: standing[0].label for claim in standing[1:]}
    return keepers


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
