"""What becomes of one clip: its verdict, its windows with their prompts, and a contact sheet of
their frames.

The sheet shows the pixels as the VAE encoder gets them, at the bucket's shape, letterbox and all.
Prompts are printed, not drawn: fonts with Hangul are not everywhere.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.rows import Clip
from shardgen.media.decode import decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.geometry import Fitting
from shardgen.media.local import find_local
from shardgen.media.probe import Probe, probe
from shardgen.rules.config import RulesConfig
from shardgen.rules.prompt import clip_prompt
from shardgen.rules.shots import PlanError
from shardgen.rules.windows import Window, clip_windows

COLUMNS, CELL_PX, HEADER_PX = 8, 240, 16


def inspect_clip(
    dataset: Path, clip_id: str, sheet: Path | None, root: Path, rules: RulesConfig
) -> Iterator[str]:
    """Lines about every label file that claims `clip_id` in the catalog of `dataset`; writes
    `sheet` (PNG) if given. `root` is the label tree and `rules` are those of the build.

    Raises ValueError if no label claims the id, or if there is no footage to show; OSError if the
    sheet can't be written.
    """
    with Catalog.open_read_only(dataset / "catalog.sqlite") as catalog:
        clips = catalog.claims(clip_id)
        if not clips:
            raise ValueError(
                f"{dataset}: no readable label claims the clip id {clip_id!r}; labels that can't "
                f"be read are in defective_samples.csv"
            )
        strips: list[Image.Image] = []
        for clip in clips:
            yield from _describe(catalog, clip, root, rules, strips if sheet else None)
    if sheet is not None:
        if not strips:
            raise ValueError(
                f"{clip_id}: there is no footage that can be decoded, so {sheet} is not written"
            )
        contact_sheet(strips).save(sheet, "PNG")
        yield f"{sheet}: {len(strips)} windows, up to {COLUMNS} frames of each"


def _describe(
    catalog: Catalog,
    clip: Clip,
    root: Path,
    rules: RulesConfig,
    strips: list[Image.Image] | None,
) -> Iterator[str]:
    """Lines about one label file; its windows are drawn into `strips` if that is a list."""
    why = f" ({clip.reason}: {clip.detail})" if clip.reason else ""
    yield f"{clip.label}: {clip.status}{why}"
    if clip.probed:
        yield f"  declared {clip.declared}, probed {clip.probed}"
    label = catalog.labels.read(clip.id)
    try:
        path, found = _footage(catalog, clip, root)
    except MediaError as error:
        yield f"  no windows: {error}"
        yield f"  all its sentences: {clip_prompt(label, clip.media_type, rules.prompt)}"
        return

    windows = catalog.shards.windows_of(clip.id)
    if not windows:
        try:
            windows = _windows(catalog, clip, found, rules)
        except PlanError as error:
            yield f"  no windows: {error}"
            try:
                windows = _windows(catalog, clip, found, rules, whole_clip=True)
                yield '  with filters.wrong_timecodes = "whole_clip" they would be:'
            except PlanError:
                pass  # nothing to show then either, and the reason is told already
    for window in windows:
        place = f"shot {window.shot}  {window.start_ms} ms"
        flags = " ".join(window.flags)
        yield f"  {window.key}  {window.split}  {window.bucket}  {place}  {flags}".rstrip()
        yield f"    {window.prompt}"

    if strips is None or not windows:
        return
    if path is None:
        yield (
            "  its footage is no longer where it was hashed: the cache has let it go, or the file "
            "was moved"
        )
        return
    try:
        strips += window_strips(path, windows, rules.windows.fit)
    except MediaError as error:
        yield f"  {error}"


def _footage(catalog: Catalog, clip: Clip, root: Path) -> tuple[Path | None, Probe]:
    """A clip's footage (None: it was there and is gone) and what it is; that of one whose label
    was rejected is probed now, if it lies beside the label.

    Raises MediaError if there is none or it can't be decoded.
    """
    if clip.probe is not None:
        try:
            return catalog.media.path(clip.media_xxh3), clip.probe
        except CatalogError:
            return None, clip.probe
    path = find_local(root / clip.label, clip.clip_id, clip.media_type)
    if path is None:
        raise MediaError(
            "media_missing", "its footage does not lie beside the label, and was not fetched"
        )
    return path, probe(path)


def _windows(
    catalog: Catalog, clip: Clip, found: Probe, rules: RulesConfig, *, whole_clip: bool = False
) -> list[Window]:
    """The windows that a clip without a plan would have. Raises PlanError if it can have none."""
    if found.media_type != clip.media_type:
        raise PlanError(
            "media_type_differs",
            f"the label says {clip.media_type}, the file is a {found.media_type}",
        )
    label = catalog.labels.read(clip.id)
    return clip_windows(clip.origin, label, found, rules, whole_clip=whole_clip)


def window_strips(path: Path, windows: Sequence[Window], fitting: Fitting) -> list[Image.Image]:
    """A strip of up to COLUMNS frames, evenly spread, for each window of one file. Raises
    MediaError.
    """
    strips: dict[int, Image.Image] = {}
    # One pass over the file for each shape.
    for shape in dict.fromkeys(window.bucket for window in windows):
        places = [i for i, window in enumerate(windows) if window.bucket == shape]
        bucket = Bucket.parse(shape)
        starts_ms = [windows[i].start_ms for i in places]
        for index, frames in decode_windows(path, starts_ms, windows[0].fps, bucket, fitting):
            place = places[index]
            count = min(COLUMNS, bucket.num_frames)
            picks = [round(i * (bucket.num_frames - 1) / max(count - 1, 1)) for i in range(count)]
            strips[place] = _strip(
                windows[place], bucket, [Image.fromarray(frames[i]) for i in picks]
            )
    return [strips[place] for place in sorted(strips)]


def _strip(window: Window, bucket: Bucket, pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures beside each other under a line that says what they are."""
    width_px = min(CELL_PX, bucket.width_px)
    height_px = max(bucket.height_px * width_px // bucket.width_px, 1)
    strip = Image.new("RGB", (width_px * len(pictures), height_px + HEADER_PX), "white")
    title = f"shot {window.shot}, {window.start_ms} ms, {window.bucket}, {window.split}"
    ImageDraw.Draw(strip).text((2, 2), title, fill="black")
    for column, picture in enumerate(pictures):
        strip.paste(picture.resize((width_px, height_px)), (column * width_px, HEADER_PX))
    return strip


def contact_sheet(strips: Sequence[Image.Image]) -> Image.Image:
    """The strips below each other."""
    width_px = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width_px, sum(strip.height for strip in strips)), "white")
    top_px = 0
    for strip in strips:
        sheet.paste(strip, (0, top_px))
        top_px += strip.height
    return sheet
