"""The stages before encoding, in the order in which build.py calls them; fetch_media has a file
of its own. Each takes the clips of one status from the catalog, asks the pure rules, and writes
the outcome back: so each can be killed and called again.

    ingested --filter_labels--> wanted --fetch_media--> fetched --probe_media--> sound
    --settle_duplicates--> sound
             --plan_shards--> accepted

and on each arrow a clip may end: skipped, rejected, unavailable, duplicate.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from loader.sample import sample_key
from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.drafts import Draft
from shardgen.catalog.tables import (
    DUPLICATE,
    FETCHED,
    INGESTED,
    REJECTED,
    SKIPPED,
    SOUND,
    UNAVAILABLE,
    WANTED,
    Outcome,
)
from shardgen.config import PromptConfig, ShardgenConfig
from shardgen.labels.parse import Label
from shardgen.media.errors import MediaError
from shardgen.media.parallel import in_parallel
from shardgen.media.probe import Probe, probe
from shardgen.rules.prompt import join_sentences, prompt_clean
from shardgen.rules.quality import Scores, Verdict, judge_label, judge_media, score_caption
from shardgen.rules.shards import (
    PlanError,
    Shot,
    Stretch,
    Window,
    assign_shards,
    nearest_aspect,
    programme_group,
    shots_of,
    split_of,
    video_stretches,
)
from shardgen.stages.fetch import Advance, unchanged

ItemT = TypeVar("ItemT")
_PAGE = 2000
_decode_probe = msgspec.json.Decoder(Probe).decode


def _pages(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    source = iter(items)
    while page := list(islice(source, _PAGE)):
        yield page


# -- labels
# -----------------------------------------------------------------------------------------------------------


def filter_labels(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """ingested -> wanted, or rejected by a label rule, or skipped by limit and sample_fraction."""
    claims = {
        row["id"]: rows[0]["label"] for rows in catalog.repeated_ids().values() for row in rows[1:]
    }
    chosen = set(catalog.first_labels(config.labels.limit)) if config.labels.limit else None
    for rows in _pages(catalog.clips(INGESTED)):
        outcomes, scores = [], []
        for row in rows:
            label = catalog.label(row["id"])
            score = score_caption(clip_prompt(label, row["media_type"], config.prompt))
            group = programme_group(
                label.station, label.broadcast_date, label.clip_id, config.split.group_by
            )
            scores.append((*score, group, row["id"]))
            if (chosen is not None and row["id"] not in chosen) or not _sampled(
                label.clip_id, config
            ):
                outcomes.append(
                    Outcome(row["id"], SKIPPED, "not_selected", "outside limit or sample_fraction")
                )
            elif row["id"] in claims:
                outcomes.append(
                    Outcome(
                        row["id"],
                        REJECTED,
                        "clip_id_repeated",
                        f"{label.clip_id} is also claimed by {claims[row['id']]}",
                    )
                )
            else:
                verdict = _judge_label(label, row["media_type"], score, config)
                outcomes.append(_outcome(row, WANTED, verdict, config.filters.score_only))
        catalog.record_scores(scores)
        catalog.record(outcomes)
        advance(len(rows))


def _sampled(clip_id: str, config: ShardgenConfig) -> bool:
    return (
        xxhash.xxh3_64_intdigest(f"sample/{clip_id}".encode())
        < config.labels.sample_fraction * 2**64
    )


def _judge_label(
    label: Label, media_type: str, scores: Scores, config: ShardgenConfig
) -> Verdict | None:
    if verdict := judge_label(label, media_type, scores, config.filters):
        return verdict
    if not _buckets(config.windows.buckets, media_type):
        return Verdict("media_type_unwanted", f"windows.buckets has no shape for a {media_type}")
    if media_type == "video" and config.filters.wrong_timecodes == "reject":
        try:
            shots_of(label)
        except PlanError as error:
            return Verdict(error.reason, error.detail)
    return None


def _outcome(row: sqlite3.Row, passed: str, verdict: Verdict | None, score_only: bool) -> Outcome:
    """A verdict as an Outcome. With score_only the clip goes on, with the first verdict on it
    kept on record.
    """
    if verdict is not None and not score_only:
        return Outcome(row["id"], REJECTED, *verdict)
    if score_only and row["reason"]:
        return Outcome(
            row["id"], passed, row["reason"], row["detail"], row["declared"], row["probed"]
        )
    return Outcome(row["id"], passed, *(verdict or ()))


def _prompt(
    label: Label,
    media_type: str,
    parts: PromptConfig,
    scenes: Iterable[str],
    objects: Iterable[str],
) -> str:
    return join_sentences(
        scenes,
        objects,
        label.semantic,
        label.stt_script,
        label.application,
        media_type,
        use_scene=parts.scene,
        use_object=parts.object,
        use_semantic=parts.semantic,
        use_stt=parts.stt,
        use_application=parts.application,
    )


def clip_prompt(label: Label, media_type: str, parts: PromptConfig) -> str:
    """The caption that the label rules judge: the prompt of all shots together."""
    return _prompt(label, media_type, parts, *_clip_sentences(label))


def _clip_sentences(label: Label) -> tuple[list[str], list[str]]:
    return [scene.text for scene in label.scenes], [each.text for each in label.objects]


def _buckets(buckets: Sequence[str], media_type: str) -> list[Bucket]:
    """Shapes of one frame are for images, the others for video."""
    return [
        bucket
        for bucket in map(Bucket.parse, buckets)
        if (bucket.num_frames == 1) == (media_type == "image")
    ]


# -- media
# ------------------------------------------------------------------------------------------------------------


def probe_media(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """fetched -> sound, or unavailable (can't be decoded), or rejected by a media rule. Each
    medium is probed once.
    """
    workers = config.labels.workers or len(os.sched_getaffinity(0))
    for rows in _pages(catalog.clips(FETCHED)):
        probes: dict[str, Probe | MediaError] = {}
        for row in rows:
            if row["probe"]:
                probes[row["media_xxh3"]] = _decode_probe(row["probe"])
            elif row["error_reason"]:
                probes[row["media_xxh3"]] = MediaError(row["error_reason"], row["error_detail"])
        todo = dict.fromkeys(row["media_xxh3"] for row in rows if row["media_xxh3"] not in probes)
        files = [(media_xxh3, catalog.media_files(media_xxh3)) for media_xxh3 in todo]
        for (media_xxh3, _), found in in_parallel(files, _probe, workers=workers):
            probes[media_xxh3] = found
            # no fact about these bytes: the next build hashes what is there then
            if isinstance(found, Vanished):
                continue
            if isinstance(found, Probe):
                catalog.record_probe(media_xxh3, msgspec.json.encode(found))
            else:
                catalog.record_probe(media_xxh3, None, found.reason, found.detail)
        catalog.record([_judge_media(row, probes[row["media_xxh3"]], config) for row in rows])
        advance(len(rows))
    bad = catalog.bad_downloads()
    # before they are deleted: a name in the catalog must stand for a file
    catalog.forget_files(bad)
    for path in bad:
        path.unlink(missing_ok=True)


class Vanished(MediaError):
    """No file holds the bytes of this hash any more: each is gone or was rewritten."""


def _probe(item: tuple[str, list[sqlite3.Row]]) -> Probe | MediaError:
    """What the bytes of this hash are; Vanished if every file that held them is gone or was
    rewritten since, while it was probed included.
    """
    media_xxh3, files = item
    for file in files:
        path = Path(file["path"])
        if not unchanged(file):
            continue
        found: Probe | MediaError
        try:
            found = probe(path)
        except MediaError as error:
            found = error
        if unchanged(file):
            return found
    gone = not any(Path(file["path"]).exists() for file in files)
    return Vanished(
        "media_missing" if gone else "media_changing",
        f"{', '.join(file['path'] for file in files)}: "
        f"{'gone' if gone else 'rewritten'} since {media_xxh3} was its hash; build again",
    )


def _judge_media(row: sqlite3.Row, found: Probe | MediaError, config: ShardgenConfig) -> Outcome:
    if isinstance(found, MediaError):
        return Outcome(row["id"], UNAVAILABLE, found.reason, found.detail)
    width_px, height_px = found.shown_size
    declared = (
        f"{row['declared_width_px']}x{row['declared_height_px']}"
        if row["declared_width_px"]
        else "unknown"
    )
    upscale = 0.0
    if buckets := nearest_aspect(
        width_px, height_px, _buckets(config.windows.buckets, row["media_type"])
    ):
        upscale = found.fit(buckets[0], config.windows.fit).factor
    verdict = judge_media(
        row["media_type"],
        row["declared_duration_s"],
        declared,
        found.media_type,
        found.duration_s,
        width_px,
        height_px,
        upscale,
        config.filters,
    )
    return _outcome(
        row, SOUND, verdict, config.filters.score_only and found.media_type == row["media_type"]
    )


def settle_duplicates(catalog: Catalog) -> None:
    """sound -> duplicate where another clip, catalogued before or of smaller id, has the same
    bytes.
    """
    catalog.record(
        [
            Outcome(
                row["id"], DUPLICATE, "duplicate_media", f"the same bytes as {rows[0]['label']}"
            )
            for rows in catalog.equal_media()
            for row in rows[1:]
            if row["status"] == SOUND
        ]
    )


# -- the plan
# ---------------------------------------------------------------------------------------------------------


def plan_shards(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> int:
    """sound -> accepted, in new shards that never change, or rejected. Returns the number of new
    shards.
    """
    with Draft(catalog.db) as draft:
        for rows in _pages(catalog.clips(SOUND)):
            windows: list[Window] = []
            rejected = []
            for row in rows:
                try:
                    windows += clip_windows(
                        row, catalog.label(row["id"]), _decode_probe(row["probe"]), config
                    )
                except PlanError as error:
                    rejected.append(
                        Outcome(
                            row["id"],
                            REJECTED,
                            error.reason,
                            error.detail,
                            error.declared,
                            error.probed,
                        )
                    )
            draft.add(windows)
            catalog.record(rejected)
            advance(len(rows))
        plans = assign_shards(
            draft.windows(), config.windows.samples_per_shard, catalog.next_shard_numbers()
        )
        return catalog.record_plan(plans)


def clip_windows(
    row: sqlite3.Row, label: Label, found: Probe, config: ShardgenConfig
) -> list[Window]:
    """All windows of a clip, in time order, with its flags (timecodes_missing, timecodes_wrong).
    Raises PlanError.
    """
    recipe, media_type = config.windows, row["media_type"]
    buckets = nearest_aspect(*found.shown_size, _buckets(recipe.buckets, media_type))
    # its label's rule says so too, but that holds nobody up with score_only, or who inspects the
    # clip
    if not buckets:
        raise PlanError("media_type_unwanted", f"windows.buckets has no shape for a {media_type}")
    flags: list[str] = []
    if media_type == "image":
        stretches = [Stretch(0, [0], Shot(0, 0, *_clip_sentences(label)), buckets[0])]
    else:
        whole_clip = config.filters.wrong_timecodes == "whole_clip" or config.filters.score_only
        stretches, flags = video_stretches(
            label, found.duration_s, buckets, recipe.fps, recipe.per_shot, whole_clip
        )
    split = split_of(row["programme"], config.split.seed, config.split.val_share)
    windows = []
    for number, starts_ms, shot, bucket in stretches:
        prompt = prompt_clean(_prompt(label, media_type, config.prompt, shot.scenes, shot.objects))
        windows += [
            Window(
                key=sample_key(
                    row["media_xxh3"], label.clip_id, number, start_ms, bucket, recipe.fps
                ),
                label=row["label"],
                clip_id=label.clip_id,
                media_type=media_type,
                category=row["category"],
                programme=row["programme"],
                split=split,
                shot=number,
                start_ms=start_ms,
                fps=recipe.fps,
                prompt=prompt,
                bucket=str(bucket),
                media_xxh3=row["media_xxh3"],
                flags=tuple(flags),
            )
            for start_ms in starts_ms
            if prompt
        ]
    if not windows:
        raise PlanError(
            "shot_short",
            f"no captioned shot is as long as a window of {buckets[-1]} at {recipe.fps} fps",
        )
    return windows
