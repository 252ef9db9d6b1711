"""The stage that fixes shards for ever: sound -> accepted, in a new shard, or duplicate, or
rejected because no window fits. It runs when every item is hashed or has failed, so that what a
shard holds does not depend on which download came first.
"""

from collections.abc import Callable

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Draft
from shardgen.catalog.tables import DUPLICATE, REJECTED, SOUND, Outcome
from shardgen.rules.config import RulesConfig
from shardgen.rules.shards import assign_shards
from shardgen.rules.shots import PlanError
from shardgen.rules.windows import Window, clip_windows


def settle_duplicates(catalog: Catalog) -> None:
    """sound -> duplicate where another clip, catalogued before or of smaller id, has the same
    bytes.
    """
    outcomes = []
    for taken, *others in catalog.equal_media():
        detail = f"the same bytes as {taken.label}"
        outcomes += [
            Outcome(claim.id, DUPLICATE, "duplicate_media", detail)
            for claim in others
            if claim.status == SOUND
        ]
    catalog.record(outcomes)


def plan_shards(catalog: Catalog, rules: RulesConfig, advance: Callable[[int], None]) -> int:
    """sound -> accepted, in new shards that never change, or rejected. Returns the number of new
    shards.
    """
    with Draft(catalog.db) as draft:
        for page in catalog.pages(SOUND):
            windows: list[Window] = []
            rejected = []
            for clip in page:
                assert clip.probe is not None, f"{clip.label} is sound without a probe"
                try:
                    label = catalog.labels.read(clip.id)
                    windows += clip_windows(clip.origin, label, clip.probe, rules)
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
