"""From a rule's verdict to what the catalog records, for the stages that ask the rules."""

from shardgen.catalog.rows import Clip
from shardgen.catalog.tables import REJECTED, Outcome
from shardgen.rules.quality import Verdict


def outcome_of(clip: Clip, passed: str, verdict: Verdict | None, *, score_only: bool) -> Outcome:
    """`passed` is the status of a clip that goes on. With `score_only` every clip does, with the
    first verdict on it on record.
    """
    if verdict is not None and not score_only:
        return Outcome(clip.id, REJECTED, *verdict)
    if score_only and clip.reason:
        return Outcome(clip.id, passed, clip.reason, clip.detail, clip.declared, clip.probed)
    return Outcome(clip.id, passed, *(verdict or ()))
