"""Case: one label file with its clip, shots, texts, prompts, probe, neighbours and decisions."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loader.manifest import DatasetError
from shardgen.labels.parse import Label, Timed
from shardgen.labels.timecode import TimecodeError, timecode_frame
from shardgen.media.probe import Probe
from shardgen.rules.windows import Window
from tools.dashboard import exports, media
from tools.dashboard.catalog import CatalogView, Clip
from tools.dashboard.render import PERSON_COOKIE, View
from tools.dashboard.review import (
    DEFECT_TYPES,
    MAX_NOTE_CHARS,
    MAX_PERSON_CHARS,
    Decision,
    ReviewError,
    clean_line,
    now,
)
from tools.dashboard.search import keys_of, neighbours, open_search
from tools.dashboard.sources import Dataset, inside

NUM_NEIGHBOURS = 6
MAX_LABEL_BYTES = 1 << 20
_FRAME_S = 1001 / 30_000  # of the labels' 29.97 fps counter


class Span(NamedTuple):
    """Seconds from the clip's first frame; None where the label has no readable timecode."""

    start_s: float | None
    end_s: float | None


class ShotRow(NamedTuple):
    """The texts that share one range of timecodes, and the samples that start in it."""

    span: Span
    timecodes: str
    scenes: list[str]
    objects: list[str]
    windows: list[Window]

    @property
    def prompts(self) -> dict[str, list[Window]]:
        """Prompt -> the samples that have it."""
        found: dict[str, list[Window]] = {}
        for window in self.windows:
            found.setdefault(window.prompt, []).append(window)
        return found


class _Tags(msgspec.Struct):
    ocr: list[str] | str | None = None


class _Generated(msgspec.Struct):
    auto_tags: _Tags | None = None


class _Source(msgspec.Struct):
    ai_generated_info: _Generated | None = None


class _File(msgspec.Struct):
    source_data_info: _Source | None = None


def span_of(timed: Timed) -> Span:
    """tc_out is inclusive: the shot ends with the frame after it."""
    try:
        first, last = timecode_frame(timed.tc_in), timecode_frame(timed.tc_out)
    except TimecodeError:
        return Span(None, None)
    return Span(first * _FRAME_S, (last + 1) * _FRAME_S)


def shot_rows(label: Label, windows: list[Window]) -> list[ShotRow]:
    """One row per range of timecodes in time order; texts without one come last."""
    rows: dict[tuple[str, str], ShotRow] = {}
    for is_scene, each in [(True, s) for s in label.scenes] + [(False, o) for o in label.objects]:
        key = (each.tc_in, each.tc_out)
        if key not in rows:
            timecodes = f"{each.tc_in} – {each.tc_out}" if each.tc_in or each.tc_out else ""
            rows[key] = ShotRow(span_of(each), timecodes, [], [], [])
        (rows[key].scenes if is_scene else rows[key].objects).append(each.text)
    ordered = sorted(
        rows.values(), key=lambda row: (row.span.start_s is None, row.span.start_s or 0.0)
    )
    for window in windows:
        for row in ordered:
            if len(ordered) == 1 or _begins_in(window, row.span):
                row.windows.append(window)
                break
    return ordered


def _begins_in(window: Window, span: Span) -> bool:
    """Windows begin on a whole millisecond, up to half of one before the shot's first frame."""
    if span.start_s is None or span.end_s is None:
        return False
    return span.start_s - 0.001 <= window.start_ms / 1000 < span.end_s


def ocr_of(dataset: Dataset, row: Clip) -> list[str] | None:
    """The text in the picture as the label file says it now; None if that can't be read."""
    if dataset.label_root is None:
        return None
    path = inside(dataset.label_root / row.label, [dataset.label_root.resolve()])
    if path is None or path.stat().st_size > MAX_LABEL_BYTES:
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    generated = found.source_data_info and found.source_data_info.ai_generated_info
    ocr = generated.auto_tags.ocr if generated and generated.auto_tags else None
    return [ocr] if isinstance(ocr, str) else ocr or []


def case(request: Request) -> Response:
    view = View(request, "case")
    return _page(view, request.path_params["clip"])


def player(request: Request) -> Response:
    """The clip alone, asked for again and again while its proxy is being made."""
    view = View(request, "case")
    catalog = view.state.catalogs[view.chosen.name]
    row = catalog.clip(request.path_params["clip"])
    if row is None:
        raise HTTPException(404, view.t("error.no_clip"))
    label = catalog.label(row.id)
    probe = catalog.probe(row.media_xxh3) if row.media_xxh3 else None
    shots = shot_rows(label, []) if label else []
    return view.answer(
        "_player.html",
        row=row,
        shots=shots,
        length_s=clip_length_s(row, probe, shots),
        shown=media.shown(view.state, view.chosen, row, probe),
    )


def sample(request: Request) -> Response:
    """One sample as its shard holds it."""
    view = View(request, "case")
    key = request.path_params["key"]
    found = view.state.catalogs[view.chosen.name].window(key)
    if found is None:
        raise HTTPException(404, view.t("error.no_media"))
    window, shard, clip = found
    return view.answer(
        "sample.html",
        window=window,
        shard=shard,
        clip=clip,
        members=media.sample_members(view.state, view.chosen, key),
        base=f"/data/{view.chosen.name}/media/sample/{key}",
    )


def _page(view: View, clip: int, message: str = "", status: int = 200) -> Response:
    catalog = view.state.catalogs[view.chosen.name]
    row = catalog.clip(clip)
    if row is None:
        raise HTTPException(404, view.t("error.no_clip"))
    label = catalog.label(clip)
    probe = catalog.probe(row.media_xxh3) if row.media_xxh3 else None
    windows, near = _indexed(view, catalog, row)
    shots = shot_rows(label, windows) if label else []
    placed = {window.key for shot in shots for window in shot.windows}
    return view.answer(
        "case.html",
        status,
        row=row,
        label=label,
        probe=probe,
        facts=facts(row, probe),
        shots=shots,
        unplaced=[window for window in windows if window.key not in placed],
        length_s=clip_length_s(row, probe, shots),
        ocr=ocr_of(view.chosen, row) if label is None or label.ocr is None else label.ocr,
        near=near,
        near_decisions=_standing(view, near),
        shown=media.shown(view.state, view.chosen, row, probe),
        history=view.state.review.history(view.chosen.name, row.label),
        defect_types=DEFECT_TYPES,
        max_note=MAX_NOTE_CHARS,
        message=message,
    )


def _indexed(view: View, catalog: CatalogView, row: Clip) -> tuple[list[Window], list[Clip]]:
    """Samples and neighbours of a row, through the index: the catalog has none for either."""
    indexer = view.state.indexers[view.chosen.name]
    if not indexer.progress.rows_ready:
        return [], []
    with open_search(indexer.path) as db:
        keys, ids = keys_of(db, row.id), neighbours(db, row.id, NUM_NEIGHBOURS)
    windows = catalog.windows(keys) if keys else []
    return windows, catalog.clips(ids) if ids else []


def _standing(view: View, rows: list[Clip]) -> dict[str, Decision]:
    labels = [row.label for row in rows]
    return view.state.review.standing(view.chosen.name, labels) if labels else {}


def clip_length_s(row: Clip, probe: Probe | None, shots: list[ShotRow]) -> float | None:
    """How long the bar of shots is: what was probed, else declared, else the last shot's end."""
    if probe is not None and probe.duration_s:
        return probe.duration_s
    ends = [shot.span.end_s for shot in shots if shot.span.end_s is not None]
    return row.declared_duration_s or max(ends, default=None)


def facts(row: Clip, probe: Probe | None) -> list[tuple[str, str | None, str | None]]:
    """(what, as the label declares it, as it was probed). Declared, None is nothing; probed, None
    is not measured and "" is nothing.
    """
    declared_size = (
        f"{row.declared_width_px}x{row.declared_height_px}" if row.declared_width_px else None
    )
    declared_s = None if row.declared_duration_s is None else f"{row.declared_duration_s:.2f} s"
    declared_fps = None if row.declared_fps is None else f"{row.declared_fps:g}"
    if probe is None:
        return [
            ("kind", row.media_type or None, None),
            ("size", declared_size, None),
            ("length", declared_s, None if row.media_type == "video" else ""),
            ("rate", declared_fps, None if row.media_type == "video" else ""),
        ]
    video = probe.media_type == "video"
    codec = f"{probe.codec}, {probe.pix_fmt}{', interlaced' if probe.interlaced else ''}"
    return [
        ("kind", row.media_type or None, probe.media_type),
        ("size", declared_size, f"{probe.width_px}x{probe.height_px}"),
        ("aspect", None, f"{probe.sar_num}:{probe.sar_den}"),
        ("length", declared_s, f"{probe.duration_s:.2f} s" if video else ""),
        ("rate", declared_fps, f"{probe.fps:.3f}".rstrip("0").rstrip(".") if video else ""),
        ("frames", None, str(probe.num_frames)),
        ("codec", None, codec),
    ]


async def decide(request: Request) -> Response:
    """A decision from the form of a case."""
    form = await request.form(max_fields=20, max_files=0)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    return await media.in_thread(_decide, View(request, "case"), fields)


def _decide(view: View, fields: dict[str, str]) -> Response:
    dataset = view.chosen
    clip = view.request.path_params["clip"]
    row = view.state.catalogs[dataset.name].clip(clip)
    if row is None:
        raise HTTPException(404, view.t("error.no_clip"))
    person = clean_line(fields.get("person", ""), MAX_PERSON_CHARS)
    decision = Decision(
        dataset=dataset.name,
        label=row.label,
        clip_id=row.clip_id,
        verdict=fields.get("verdict", ""),
        type=fields.get("type", ""),
        note=fields.get("note", "").replace("\r\n", "\n").strip(),
        person=person,
        time=now(),
    )
    try:
        view.state.review.decide(decision)
        exports.update_exclusions(dataset, partial(view.state.review.newest, dataset.name))
        message = view.t("case.saved", file=_shown_path(dataset.exclusions))
    except ReviewError as error:
        return _page(view, clip, str(error), 400)
    except (OSError, DatasetError) as error:
        message = view.t("case.not_written", file=_shown_path(dataset.exclusions), error=str(error))
    response = _page(view, clip, message)
    view.set_cookie(response, PERSON_COOKIE, person)
    return response


def _shown_path(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
