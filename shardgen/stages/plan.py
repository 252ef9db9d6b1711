"""The stage that fixes shards for ever: sound -> accepted, in a new shard, or duplicate, or
rejected because no window fits. It runs when every item is hashed or has failed, so that what a
shard holds does not depend on which download came first.
"""

from collections.abc import Callable

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Draft
from shardgen.catalog.rows import Claim, Clip
from shardgen.catalog.tables import ACCEPTED, DUPLICATE, REJECTED, SOUND, Outcome
from shardgen.rules.config import RulesConfig
from shardgen.rules.shards import assign_shards
from shardgen.rules.shots import PlanError
from shardgen.rules.windows import Window, clip_windows


def settle_duplicates(catalog: Catalog, rules: RulesConfig) -> None:
    """sound -> duplicate where another clip, catalogued before or of smaller id, has the same
    bytes, and gives windows: one that does not, for its label's timecodes, takes nobody's place.
    """
    outcomes = []
    for claims in catalog.equal_media():
        taken = ""
        for claim in claims:
            if not taken:
                taken = claim.label if _is_taken(catalog, claim, rules) else ""
            elif claim.status == SOUND:
                detail = f"the same bytes as {taken}"
                outcomes.append(Outcome(claim.id, DUPLICATE, "duplicate_media", detail))
    catalog.record(outcomes)


def _is_taken(catalog: Catalog, claim: Claim, rules: RulesConfig) -> bool:
    if claim.status == ACCEPTED:
        return True
    (clip,) = (clip for clip in catalog.claims(claim.clip_id) if clip.id == claim.id)
    try:
        return bool(_windows(catalog, clip, rules))
    except PlanError:
        return False


def _windows(catalog: Catalog, clip: Clip, rules: RulesConfig) -> list[Window]:
    """The windows of a sound clip. Raises PlanError if it gives none."""
    assert clip.probe is not None, f"{clip.label} is sound without a probe"
    return clip_windows(clip.origin, catalog.labels.read(clip.id), clip.probe, rules)


def plan_shards(catalog: Catalog, rules: RulesConfig, advance: Callable[[int], None]) -> int:
    """sound -> accepted, in new shards that never change, or rejected. Returns the number of new
    shards.
    """
    with Draft(catalog.db) as draft:
        for page in catalog.pages(SOUND):
            windows: list[Window] = []
            rejected = []
            for clip in page:
                try:
                    windows += _windows(catalog, clip, rules)
                except PlanError as error:
                    rejected.append(
                        Outcome(
                            clip.id,
                            REJECTED,
                            reason=error.reason,
                            detail=error.detail,
                            declared=error.declared,
                            probed=error.probed,
                        )
                    )
            draft.add(windows)
            catalog.record(rejected)
            advance(len(page))
        plans = assign_shards(
            draft.windows(), rules.windows.samples_per_shard, catalog.shards.next_numbers()
        )
        return catalog.shards.record_plan(plans)
