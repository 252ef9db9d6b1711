"""The stages before encoding, in the order in which build.py calls them. Each takes the clips of one status from the
catalog, asks the pure rules, and writes the outcome back: so each can be killed and called again.

    ingested --filter_labels--> wanted --fetch_media--> fetched --probe_media--> sound --settle_duplicates--> sound
             --plan_shards--> accepted

and on each arrow a clip may end: skipped, rejected, unavailable, duplicate.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import xxhash

from loader.sample import Bucket, sample_key
from shardgen.cache import Room
from shardgen.catalog import Catalog, CatalogError
from shardgen.config import PromptConfig, ShardgenConfig, cache_folder
from shardgen.fetch import (
    PERMANENT,
    Fetched,
    FetchError,
    Patience,
    check_url,
    download,
    find_local,
    hash_local,
    in_parallel,
)
from shardgen.labels import Label
from shardgen.media import MediaError, Probe, fit, probe
from shardgen.plan import (
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
from shardgen.prompt import join_sentences, prompt_clean
from shardgen.quality import Scores, Verdict, judge_label, judge_media, score_caption
from shardgen.tables import (
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

Advance = Callable[[int], None]
ItemT = TypeVar("ItemT")
_PAGE = 2000
_decode_probe = msgspec.json.Decoder(Probe).decode


def _pages(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    source = iter(items)
    while page := list(islice(source, _PAGE)):
        yield page


# -- labels -----------------------------------------------------------------------------------------------------------


def filter_labels(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """ingested -> wanted, or rejected by a label rule, or skipped by limit and sample_fraction."""
    claims = {row["id"]: rows[0]["label"] for rows in catalog.repeated_ids().values() for row in rows[1:]}
    chosen = set(catalog.first_labels(config.labels.limit)) if config.labels.limit else None
    for rows in _pages(catalog.clips(INGESTED)):
        outcomes, scores = [], []
        for row in rows:
            label = catalog.label(row["id"])
            score = score_caption(_prompt(label, row["media_type"], config.prompt, *_clip_sentences(label)))
            group = programme_group(label.station, label.broadcast_date, label.clip_id, config.split.group_by)
            scores.append((*score, group, row["id"]))
            if (chosen is not None and row["id"] not in chosen) or not _sampled(label.clip_id, config):
                outcomes.append(Outcome(row["id"], SKIPPED, "not_selected", "outside limit or sample_fraction"))
            elif row["id"] in claims:
                outcomes.append(Outcome(row["id"], REJECTED, "clip_id_repeated", f"{label.clip_id} is also claimed by "
                                        f"{claims[row['id']]}"))
            else:
                verdict = _judge_label(label, row["media_type"], score, config)
                outcomes.append(_outcome(row, WANTED, verdict, config.filters.score_only))
        catalog.record_scores(scores)
        catalog.record(outcomes)
        advance(len(rows))


def _sampled(clip_id: str, config: ShardgenConfig) -> bool:
    return xxhash.xxh3_64_intdigest(f"sample/{clip_id}".encode()) < config.labels.sample_fraction * 2**64


def _judge_label(label: Label, media_type: str, scores: Scores, config: ShardgenConfig) -> Verdict | None:
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
    """A verdict as an Outcome. With score_only the clip goes on, with the first verdict on it kept on record."""
    if verdict is not None and not score_only:
        return Outcome(row["id"], REJECTED, *verdict)
    if score_only and row["reason"]:
        return Outcome(row["id"], passed, row["reason"], row["detail"], row["declared"], row["probed"])
    return Outcome(row["id"], passed, *(verdict or ()))


def _prompt(label: Label, media_type: str, parts: PromptConfig, scenes: Iterable[str], objects: Iterable[str]) -> str:
    return join_sentences(scenes, objects, label.semantic, label.stt_script, label.application, media_type,
                          use_scene=parts.scene, use_object=parts.object, use_semantic=parts.semantic,
                          use_stt=parts.stt, use_application=parts.application)


def _clip_sentences(label: Label) -> tuple[list[str], list[str]]:
    return [scene.text for scene in label.scenes], [each.text for each in label.objects]


def _buckets(buckets: Sequence[str], media_type: str) -> list[Bucket]:
    """Shapes of one frame are for images, the others for video."""
    return [bucket for bucket in map(Bucket.parse, buckets) if (bucket.num_frames == 1) == (media_type == "image")]


# -- media ------------------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """Media to hash: a local file, or a URL (then `host` is not empty), and the clips that want it."""

    source: str
    host: str
    clips: list[int]


def fetch_media(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """wanted, or unavailable if asking again may help -> fetched (media_xxh3 known), or unavailable.

    Raises OSError if the cache can't be written.
    """
    fetch, cache = config.fetch, cache_folder(config)
    schemes, max_bytes = tuple(fetch.schemes), int(fetch.max_file_gib * 2**30)
    patience = Patience(fetch.timeout_s, fetch.retries, fetch.backoff_s, max_bytes)

    room = Room(cache, int(fetch.cache_limit_gib * 2**30))

    def get(request: _Request) -> Fetched:
        if not request.host:
            return hash_local(Path(request.source))
        if room.full:
            raise FetchError("cache_full", f"{cache} holds {fetch.cache_limit_gib} GiB that shards still need; build "
                             f"again to go on, or raise fetch.cache_limit_gib", may_pass=True)
        return download(request.source, cache, schemes, patience)

    requests = _requests(catalog, config, advance)
    for request, got in in_parallel(requests, get, lambda request: request.host, workers=fetch.workers,
                                    per_host=fetch.per_host):
        if isinstance(got, FetchError):
            catalog.record([Outcome(clip, UNAVAILABLE, got.reason, got.detail) for clip in request.clips])
        else:
            catalog.record_source(request.clips, request.source, *got)
            if request.host and room.take(got.size_bytes):
                catalog.forget_files(room.evict(catalog.unused_media()))
        advance(len(request.clips))


def _requests(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> Iterator[_Request]:
    """What must be hashed, local files first. Clips that need no work are recorded on the way."""
    root, urls = Path(config.labels.root), dict[str, list[int]]()
    for row in catalog.clips(WANTED, UNAVAILABLE):
        local = find_local(root / row["label"], row["clip_id"], row["media_type"])
        if local is not None:
            if not _reuse(catalog, [row["id"]], str(local)):
                yield _Request(str(local), "", [row["id"]])
                continue
        elif not row["url"]:
            catalog.record([Outcome(row["id"], UNAVAILABLE, "media_missing", "no file beside the label, no URL in it")])
        elif row["reason"] in PERMANENT and not config.fetch.ask_again:
            catalog.record([Outcome(row["id"], UNAVAILABLE, row["reason"], row["detail"])])
        else:
            urls.setdefault(row["url"], []).append(row["id"])
            continue
        advance(1)
    for url, clips in urls.items():
        if _reuse(catalog, clips, url):
            advance(len(clips))
            continue
        try:
            yield _Request(url, check_url(url, config.fetch.schemes), clips)
        except FetchError as error:
            catalog.record([Outcome(clip, UNAVAILABLE, error.reason, error.detail) for clip in clips])
            advance(len(clips))


def _reuse(catalog: Catalog, clips: Sequence[int], source: str) -> bool:
    """True if the source was hashed before and its file has the size and mtime of then."""
    known = catalog.source(source)
    if known is None:
        return False
    try:
        now = Path(known["path"]).stat()
    except FileNotFoundError:
        return False
    if (now.st_size, now.st_mtime_ns) != (known["size_bytes"], known["mtime_ns"]):
        return False
    catalog.record_source(clips, source, Path(known["path"]), *known[2:])
    return True


def probe_media(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> None:
    """fetched -> sound, or unavailable (can't be decoded), or rejected by a media rule. Each medium is probed once."""
    workers = config.labels.workers or len(os.sched_getaffinity(0))
    for rows in _pages(catalog.clips(FETCHED)):
        probes: dict[str, Probe | MediaError] = {}
        for row in rows:
            if row["probe"]:
                probes[row["media_xxh3"]] = _decode_probe(row["probe"])
            elif row["error_reason"]:
                probes[row["media_xxh3"]] = MediaError(row["error_reason"], row["error_detail"])
        todo = dict.fromkeys(row["media_xxh3"] for row in rows if row["media_xxh3"] not in probes)
        paths = []
        for media_xxh3 in todo:
            try:
                paths.append((media_xxh3, catalog.media_path(media_xxh3)))
            except CatalogError as error:  # gone since it was hashed: the clips' fault, not the run's
                probes[media_xxh3] = MediaError("media_missing", str(error))
        for (media_xxh3, _), found in in_parallel(paths, _probe, lambda item: "", workers=workers, per_host=1):
            assert not isinstance(found, FetchError)
            probes[media_xxh3] = found
            if isinstance(found, Probe):
                catalog.record_probe(media_xxh3, msgspec.json.encode(found))
            else:
                catalog.record_probe(media_xxh3, None, found.reason, found.detail)
        catalog.record([_judge_media(row, probes[row["media_xxh3"]], config) for row in rows])
        advance(len(rows))
    bad = catalog.bad_downloads()
    catalog.forget_files(bad)  # before they are deleted: a name in the catalog must stand for a file
    for path in bad:
        path.unlink(missing_ok=True)


def _probe(item: tuple[str, Path]) -> Probe | MediaError:
    try:
        return probe(item[1])
    except MediaError as error:
        return error


def _judge_media(row: sqlite3.Row, found: Probe | MediaError, config: ShardgenConfig) -> Outcome:
    if isinstance(found, MediaError):
        return Outcome(row["id"], UNAVAILABLE, found.reason, found.detail)
    width_px, height_px = shown_size(found)
    declared = f"{row['declared_width_px']}x{row['declared_height_px']}" if row["declared_width_px"] else "unknown"
    upscale = 0.0
    if buckets := nearest_aspect(width_px, height_px, _buckets(config.windows.buckets, row["media_type"])):
        upscale = fit(found.width_px, found.height_px, Fraction(found.sar_num, found.sar_den), found.rotation_deg,
                      buckets[0], config.windows.fit).factor
    verdict = judge_media(row["media_type"], row["declared_duration_s"], declared, found.media_type, found.duration_s,
                          width_px, height_px, upscale, config.filters)
    return _outcome(row, SOUND, verdict, config.filters.score_only and found.media_type == row["media_type"])


def shown_size(found: Probe) -> tuple[int, int]:
    """Width and height on the screen, in square pixels: stored size, pixel aspect ratio and rotation applied."""
    width_px, height_px = max(round(found.width_px * found.sar_num / found.sar_den), 1), found.height_px
    return (height_px, width_px) if found.rotation_deg % 180 else (width_px, height_px)


def settle_duplicates(catalog: Catalog) -> None:
    """sound -> duplicate where another clip, catalogued before or of smaller id, has the same bytes."""
    catalog.record([Outcome(row["id"], DUPLICATE, "duplicate_media", f"the same bytes as {rows[0]['label']}")
                    for rows in catalog.equal_media() for row in rows[1:] if row["status"] == SOUND])


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan_shards(catalog: Catalog, config: ShardgenConfig, advance: Advance) -> int:
    """sound -> accepted, in new shards that never change, or rejected. Returns the number of new shards."""
    windows: list[Window] = []
    accepted: list[tuple[int, str, int, str]] = []
    clips: dict[str, int] = {}
    for rows in _pages(catalog.clips(SOUND)):
        rejected = []
        for row in rows:
            try:
                found, flags = clip_windows(row, catalog.label(row["id"]), _decode_probe(row["probe"]), config)
            except PlanError as error:
                rejected.append(Outcome(row["id"], REJECTED, error.reason, error.detail, error.declared, error.probed))
                continue
            windows += found
            accepted.append((row["id"], found[0].split, len(found), " ".join(flags)))
            clips[row["label"]] = row["id"]
        catalog.record(rejected)
        advance(len(rows))
    plans = assign_shards(windows, config.windows.samples_per_shard, catalog.next_shard_numbers())
    catalog.record_plan(plans, accepted, clips)
    return len(plans)


def clip_windows(row: sqlite3.Row, label: Label, found: Probe,
                 config: ShardgenConfig) -> tuple[list[Window], list[str]]:
    """All windows of a clip, in time order, and flags (timecodes_missing, timecodes_wrong). Raises PlanError."""
    recipe, media_type = config.windows, row["media_type"]
    buckets = nearest_aspect(*shown_size(found), _buckets(recipe.buckets, media_type))
    flags: list[str] = []
    if media_type == "image":
        stretches = [Stretch(0, [0], Shot(0, 0, *_clip_sentences(label)), buckets[0])]
    else:
        whole_clip = config.filters.wrong_timecodes == "whole_clip" or config.filters.score_only
        stretches, flags = video_stretches(label, found.duration_s, buckets, recipe.fps, recipe.per_shot, whole_clip)
    split = split_of(row["programme"], config.split.seed, config.split.val_share)
    windows = []
    for number, starts_ms, shot, bucket in stretches:
        prompt = prompt_clean(_prompt(label, media_type, config.prompt, shot.scenes, shot.objects))
        windows += [Window(
            key=sample_key(row["media_xxh3"], label.clip_id, number, start_ms, bucket, recipe.fps), label=row["label"],
            clip_id=label.clip_id, media_type=media_type, category=row["category"], programme=row["programme"],
            split=split, shot=number, start_ms=start_ms, fps=recipe.fps, prompt=prompt, bucket=str(bucket),
            media_xxh3=row["media_xxh3"], flags=tuple(flags)) for start_ms in starts_ms if prompt]
    if not windows:
        raise PlanError("shot_short", f"no captioned shot is as long as a window of {buckets[-1]} at {recipe.fps} fps")
    return windows, flags
