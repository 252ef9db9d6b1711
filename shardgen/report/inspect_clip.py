"""What becomes of one clip: its verdict, its windows with their prompts, and a contact sheet of
their frames.

The sheet shows the pixels as the VAE encoder gets them, at the bucket's shape, letterbox and all.
Prompts are printed, not drawn: fonts with Hangul are not everywhere.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace
from PIL import Image, ImageDraw

from loader.config import load_toml
from loader.shape import WAN22
from shardgen.catalog.catalog import Catalog, CatalogError
from shardgen.config import ShardgenConfig
from shardgen.media.decode import decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fitting
from shardgen.media.local import find_local
from shardgen.media.probe import Probe, probe
from shardgen.rules.shards import PlanError, Window
from shardgen.stages.filter import clip_prompt, clip_windows

COLUMNS, CELL_PX, HEADER_PX = 8, 240, 16


def inspect_clip(dataset: Path, clip_id: str, sheet: Path | None) -> Iterator[str]:
    """Lines about every label file that claims `clip_id` in the catalog of `dataset`; writes
    `sheet` (PNG) if given.

    Raises ValueError if no label claims the id, or if there is no footage to show; OSError if the
    sheet can't be written.
    """
    if not (dataset / "catalog.sqlite").is_file():
        raise ValueError(
            f"{dataset}: holds no catalog.sqlite; name the output folder of a build with --dataset"
        )
    config = load_toml(dataset / "config.toml", ShardgenConfig)
    with Catalog(dataset / "catalog.sqlite") as catalog:
        rows = catalog.claims(clip_id)
        if not rows:
            raise ValueError(
                f"{dataset}: no readable label claims the clip id {clip_id!r}; labels that can't be read "
                f"are in defective_samples.csv"
            )
        strips: list[Image.Image] = []
        for row in rows:
            yield f"{row['label']}: {row['status']}" + (
                f" ({row['reason']}: {row['detail']})" if row["reason"] else ""
            )
            if row["probed"]:
                yield f"  declared {row['declared']}, probed {row['probed']}"
            try:
                path, found = _footage(catalog, row, Path(config.labels.root))
            except MediaError as error:
                label = catalog.label(row["id"])
                yield f"  no windows: {error}"
                yield f"  all its sentences: {clip_prompt(label, row['media_type'], config.prompt)}"
                continue
            try:
                windows = _windows(catalog, row, found, config)
            except PlanError as error:
                yield f"  no windows: {error}"
                windows = _windows_of_the_whole(catalog, row, found, config)
                if windows:
                    yield '  with filters.wrong_timecodes = "whole_clip" they would be:'
            for window in windows:
                yield (
                    f"  {window.key}  {window.split}  {window.bucket}  shot {window.shot}  {window.start_ms} ms  "
                    f"{' '.join(window.flags)}".rstrip()
                )
                yield f"    {window.prompt}"
            if sheet is not None and windows and path is None:
                yield "  its footage is where it was hashed no more: the cache has let it go, or the file was moved"
            elif sheet is not None and windows and path is not None:
                try:
                    strips += window_strips(path, windows, config.windows.fit)
                except MediaError as error:
                    yield f"  {error}"
    if sheet is not None:
        if not strips:
            raise ValueError(
                f"{clip_id}: there is no footage that can be decoded, so {sheet} is not written"
            )
        contact_sheet(strips).save(sheet, "PNG")
        yield f"{sheet}: {len(strips)} windows, up to {COLUMNS} frames of each"


def _footage(catalog: Catalog, row: sqlite3.Row, root: Path) -> tuple[Path | None, Probe]:
    """A clip's footage (None: it was there and is gone) and what it is; that of one whose label
    was rejected is probed now, if it lies beside the label.

    Raises MediaError if there is none or it can't be decoded.
    """
    if row["probe"]:
        found = msgspec.json.decode(row["probe"], type=Probe)
        try:
            return catalog.media_path(row["media_xxh3"]), found
        except CatalogError:
            return None, found
    path = find_local(root / row["label"], row["clip_id"], row["media_type"])
    if path is None:
        raise MediaError(
            "media_missing", "its footage does not lie beside the label, and was not fetched"
        )
    return path, probe(path)


def _windows(
    catalog: Catalog, row: sqlite3.Row, found: Probe, config: ShardgenConfig
) -> list[Window]:
    """The clip's planned windows, or those it would have. Raises PlanError if it can have none."""
    planned = catalog.clip_windows(row["id"])
    if planned:
        return planned
    if found.media_type != row["media_type"]:
        raise PlanError(
            "media_type_differs",
            f"the label says {row['media_type']}, the file is a {found.media_type}",
        )
    return clip_windows(row, catalog.label(row["id"]), found, config)


def _windows_of_the_whole(
    catalog: Catalog, row: sqlite3.Row, found: Probe, config: ShardgenConfig
) -> list[Window]:
    """What the clip would give if its timecodes didn't matter; [] if that is nothing either."""
    try:
        lenient = replace(config, filters=replace(config.filters, wrong_timecodes="whole_clip"))
        return _windows(catalog, row, found, lenient)
    except PlanError:
        return []


def window_strips(path: Path, windows: Sequence[Window], fitting: Fitting) -> list[Image.Image]:
    """A strip of up to COLUMNS frames, evenly spread, for each window of one file. Raises
    MediaError.
    """
    strips: list[tuple[int, Image.Image]] = []
    for shape in dict.fromkeys(window.bucket for window in windows):
        places = [i for i, window in enumerate(windows) if window.bucket == shape]
        bucket = WAN22.parse(shape)
        starts_ms = [windows[i].start_ms for i in places]
        for index, frames in decode_windows(path, starts_ms, windows[0].fps, bucket, fitting):
            count = min(COLUMNS, bucket.num_frames)
            picks = [round(i * (bucket.num_frames - 1) / max(count - 1, 1)) for i in range(count)]
            width_px = min(CELL_PX, bucket.width_px)
            height_px = max(bucket.height_px * width_px // bucket.width_px, 1)
            strip = Image.new("RGB", (width_px * count, height_px + HEADER_PX), "white")
            window = windows[places[index]]
            ImageDraw.Draw(strip).text(
                (2, 2),
                f"shot {window.shot}, {window.start_ms} ms, {shape}, {window.split}",
                fill="black",
            )
            for column, frame in enumerate(picks):
                cell = Image.fromarray(frames[frame]).resize((width_px, height_px))
                strip.paste(cell, (column * width_px, HEADER_PX))
            strips.append((places[index], strip))
    return [strip for _, strip in sorted(strips, key=lambda each: each[0])]


def contact_sheet(strips: Sequence[Image.Image]) -> Image.Image:
    """The strips below each other."""
    sheet = Image.new(
        "RGB",
        (max(strip.width for strip in strips), sum(strip.height for strip in strips)),
        "white",
    )
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet
