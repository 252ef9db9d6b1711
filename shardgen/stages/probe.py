"""The stage that decodes every medium once: fetched -> sound, or unavailable (can't be decoded),
or rejected by a media rule.
"""

import os
from collections.abc import Callable

from shardgen.catalog.catalog import Catalog
from shardgen.catalog.rows import Clip, MediaFile
from shardgen.catalog.tables import FETCHED, SOUND, UNAVAILABLE, Outcome
from shardgen.media.errors import MediaError
from shardgen.media.parallel import in_parallel
from shardgen.media.probe import Probe, probe
from shardgen.rules.config import RulesConfig
from shardgen.rules.quality import judge_media
from shardgen.rules.windows import nearest_aspect
from shardgen.stages.verdict import outcome_of


def probe_media(
    catalog: Catalog, rules: RulesConfig, workers: int, advance: Callable[[int], None]
) -> None:
    """fetched -> sound, or unavailable (can't be decoded), or rejected by a media rule. Each
    medium is probed once, `workers` of them at a time (0: one per CPU).
    """
    workers = workers or len(os.sched_getaffinity(0))
    for page in catalog.pages(FETCHED):
        # What is known of the bytes already, from this build or an earlier one.
        probes: dict[str, Probe | MediaError] = {}
        for clip in page:
            if clip.probe is not None:
                probes[clip.media_xxh3] = clip.probe
            elif clip.probe_error:
                probes[clip.media_xxh3] = MediaError(clip.probe_error, clip.probe_error_detail)
        todo = dict.fromkeys(clip.media_xxh3 for clip in page if clip.media_xxh3 not in probes)
        files = [(media_xxh3, catalog.media.files(media_xxh3)) for media_xxh3 in todo]
        for (media_xxh3, _), found in in_parallel(files, _probe, workers=workers):
            probes[media_xxh3] = found
            # Vanished is no fact about these bytes, so it isn't recorded as one: the next build
            # hashes what is there then.
            if not isinstance(found, Vanished):
                catalog.media.record_probe(media_xxh3, found)
        catalog.record([_judge(clip, probes[clip.media_xxh3], rules) for clip in page])
        advance(len(page))

    bad = catalog.media.bad_downloads()
    # Before they are deleted: a name in the catalog must stand for a file.
    catalog.media.forget_files(bad)
    for path in bad:
        path.unlink(missing_ok=True)


class Vanished(MediaError):
    """No file holds the bytes of this hash any more: each is gone or was rewritten."""


def _probe(item: tuple[str, list[MediaFile]]) -> Probe | MediaError:
    """What the bytes of this hash are; Vanished if every file that held them is gone or was
    rewritten since, while it was probed included.
    """
    media_xxh3, files = item
    for file in files:
        if not file.is_unchanged():
            continue
        found: Probe | MediaError
        try:
            found = probe(file.path)
        except MediaError as error:
            found = error
        if file.is_unchanged():
            return found
    gone = not any(file.path.exists() for file in files)
    return Vanished(
        "media_missing" if gone else "media_changing",
        f"{', '.join(str(file.path) for file in files)}: "
        f"{'gone' if gone else 'rewritten'} since {media_xxh3} was its hash; build again",
    )


def _judge(clip: Clip, found: Probe | MediaError, rules: RulesConfig) -> Outcome:
    if isinstance(found, MediaError):
        return Outcome(clip.id, UNAVAILABLE, found.reason, found.detail)
    width_px, height_px = found.shown_size
    buckets = nearest_aspect(width_px, height_px, rules.windows.buckets_for(clip.media_type))
    verdict = judge_media(
        media_type=clip.media_type,
        declared_duration_s=clip.declared_duration_s,
        declared_size=clip.declared_size,
        probed_type=found.media_type,
        probed_duration_s=found.duration_s,
        width_px=width_px,
        height_px=height_px,
        upscale=found.fit(buckets[0], rules.windows.fit).factor if buckets else 0.0,
        filters=rules.filters,
    )
    # A file of the wrong kind can't be encoded, so even score_only does not let it pass.
    score_only = rules.filters.score_only and found.media_type == clip.media_type
    return outcome_of(clip, SOUND, verdict, score_only=score_only)
