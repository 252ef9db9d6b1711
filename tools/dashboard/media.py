"""Which picture of a clip or sample is shown, and its bytes by range.

A request names a row of the catalog or a sample key, never a path. Paths come from the catalog and
are data: the real file must lie below the label root, the media cache or the dataset, or it is not
served. URLs of labels are never fetched.

Of a clip: the original where a browser plays it, else a proxy that proxy.py makes, else a still.
Of a sample: KEY.mp4 out of its shard, else KEY.jpg. What is shown is always named.
"""

import mimetypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from loader.manifest import DatasetError, Member, decode_index
from loader.sample import JPG, MP4, split_member_name
from shardgen.media.local import find_local
from shardgen.media.probe import Probe
from tools.dashboard import proxy
from tools.dashboard.catalog import Clip
from tools.dashboard.render import View
from tools.dashboard.sources import Dataset, inside
from tools.dashboard.state import State

P = ParamSpec("P")
T = TypeVar("T")
_CHUNK_BYTES = 1 << 18
_KEY_CHARS = 32
_MP4_MAGIC, _WEBM_MAGIC = b"ftyp", b"\x1aE\xdf\xa3"
_PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}

Kind = Literal["original", "proxy", "making", "still", "picture", "none"]


class Shown(NamedTuple):
    """What a case shows: `url` is "" where there is nothing; `why` says why it is not the
    original.
    """

    kind: Kind
    url: str
    why: str = ""


def shown(state: State, dataset: Dataset, row: Clip, probe: Probe | None) -> Shown:
    """The best picture of a clip that there is now."""
    path = clip_path(state, dataset, row)
    base = f"/data/{dataset.name}/media"
    if path is None:
        return Shown("none", "", "missing")
    if picture_type(path):
        return Shown("picture", f"{base}/clip/{row.id}")
    if probe is None:
        return Shown("none", "", "undecodable")
    if browser_plays(path, probe):
        return Shown("original", f"{base}/clip/{row.id}")
    made = proxy.state_of(state.sources.proxies, row.media_xxh3)
    if made == "ready":
        return Shown("proxy", f"{base}/proxy/{row.id}", "not_playable")
    if made == "failed":
        return Shown("still", f"{base}/still/{row.id}", "proxy_failed")
    proxy.request(state.sources.proxies, row.media_xxh3, path)
    return Shown("making", f"{base}/still/{row.id}", "not_playable")


def clip_path(state: State, dataset: Dataset, row: Clip) -> Path | None:
    """Where a clip's media really lie; None where they are missing or lie outside."""
    roots = dataset.media_roots
    if row.media_xxh3:
        for path in state.catalogs[dataset.name].media_paths(row.media_xxh3):
            if real := inside(path, roots):
                return real
    if dataset.label_root is not None and row.clip_id:
        beside = find_local(dataset.label_root / row.label, row.clip_id, row.media_type)
        return inside(beside, roots) if beside else None
    return None


def browser_plays(path: Path, probe: Probe) -> bool:
    """H.264 in MP4, or VP8, VP9 and AV1 in WebM, 8-bit 4:2:0 and progressive: what every browser
    has.
    """
    if probe.pix_fmt not in ("yuv420p", "yuvj420p") or probe.interlaced or probe.bit_depth != 8:
        return False
    magic = _magic(path)
    if magic[4:8] == _MP4_MAGIC:
        return probe.codec == "h264"
    return magic[:4] == _WEBM_MAGIC and probe.codec in ("vp8", "vp9", "av1")


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(12)
    except OSError:
        return b""


def picture_type(path: Path) -> str:
    """MIME type of a picture that browsers show; "" for anything else."""
    magic = _magic(path)
    return next((kind for start, kind in _PICTURES.items() if magic.startswith(start)), "")


def clip_media(request: Request) -> Response:
    """The original file of a clip."""
    view, row, probe = _asked(request)
    path = clip_path(view.state, view.chosen, row)
    if path is None:
        raise HTTPException(404, view.t("error.no_media"))
    if kind := picture_type(path):
        return FileResponse(path, media_type=kind)
    if probe is None or not browser_plays(path, probe):
        raise HTTPException(404, view.t("error.not_playable"))
    webm = _magic(path)[:4] == _WEBM_MAGIC
    return FileResponse(path, media_type="video/webm" if webm else "video/mp4")


def proxy_media(request: Request) -> Response:
    """The H.264 proxy of a clip, once it is made."""
    view, row, _ = _asked(request)
    path = proxy.path_of(view.state.sources.proxies, row.media_xxh3)
    if path is None or not path.is_file():
        raise HTTPException(404, view.t("error.no_media"))
    return FileResponse(path, media_type="video/mp4")


def still_media(request: Request) -> Response:
    """The first picture of a clip."""
    view, row, _ = _asked(request)
    path = clip_path(view.state, view.chosen, row)
    picture = proxy.still(path) if path else None
    if picture is None:
        raise HTTPException(404, view.t("error.no_media"))
    return Response(picture, media_type="image/jpeg")


def _asked(request: Request) -> tuple[View, Clip, Probe | None]:
    view = View(request)
    catalog = view.state.catalogs[view.chosen.name]
    row = catalog.clip(request.path_params["clip"])
    if row is None:
        raise HTTPException(404, view.t("error.no_clip"))
    return view, row, catalog.probe(row.media_xxh3) if row.media_xxh3 else None


class SampleMember(NamedTuple):
    """A member of a shard: which bytes of which file."""

    path: Path
    member: Member
    media_type: str


def sample_members(state: State, dataset: Dataset, key: str) -> dict[str, SampleMember]:
    """ "mp4" and "jpg" of a sample, those that its shard holds; empty for an unknown key."""
    found = state.catalogs[dataset.name].window(key)
    if found is None:
        return {}
    window, shard, _ = found
    tar = inside(dataset.folder / window.split / f"{shard}.tar", [dataset.folder.resolve()])
    if tar is None:
        return {}
    try:
        index = state.recent.get(
            ("index", tar), lambda: decode_index(tar.with_suffix(".idx").read_bytes(), shard)
        )
    except (OSError, DatasetError):
        return {}
    sample = next((each for each in index if each[0].name.startswith(f"{key}.")), [])
    kinds = {MP4: "video/mp4", JPG: "image/jpeg"}
    return {
        extension: SampleMember(tar, member, kinds[extension])
        for member in sample
        if (extension := split_member_name(member.name)[1]) in kinds
    }


def sample_media(request: Request) -> Response:
    """KEY.mp4 or KEY.jpg out of the shard of a sample."""
    view = View(request)
    key, extension = request.path_params["key"], request.path_params["extension"]
    if len(key) != _KEY_CHARS:
        raise HTTPException(404, view.t("error.no_media"))
    found = sample_members(view.state, view.chosen, key).get(extension)
    if found is None:
        raise HTTPException(404, view.t("error.no_media"))
    return ranged(request, found)


def ranged(request: Request, found: SampleMember) -> Response:
    """The bytes of a member, or the range of them that is asked for."""
    size = found.member.size
    etag = f'"{found.path.stat().st_mtime_ns:x}-{found.member.offset:x}-{size:x}"'
    headers = {"accept-ranges": "bytes", "etag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    text = request.headers.get("range", "")
    if request.headers.get("if-range", etag) != etag:
        text = ""
    span = byte_range(text, size) if text else (0, size)
    if span is None:
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    start, end = span
    headers["content-length"] = str(end - start)
    if text:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(
        _bytes_of(found.path, found.member.offset + start, end - start),
        206 if text else 200,
        headers,
        found.media_type,
    )


def byte_range(text: str, size: int) -> tuple[int, int] | None:
    """ "bytes=100-199" -> (100, 200); None for what can't be had. Only the first of several ranges
    is served, which a server may do.
    """
    unit, _, ranges = text.partition("=")
    first, separator, last = ranges.partition(",")[0].strip().partition("-")
    if unit.strip() != "bytes" or not separator:
        return None
    if any(
        part and not (part.isascii() and part.isdigit() and len(part) < 19)
        for part in (first, last)
    ):
        return None
    if not first:
        return (max(0, size - int(last)), size) if last and int(last) and size else None
    start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None


def _bytes_of(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (data := file.read(min(size, _CHUNK_BYTES))):
            size -= len(data)
            yield data


def folder_file(folder: Path, relative: str) -> Path | None:
    """A file that a JSON file of `folder` names; None unless it really lies inside it."""
    if not relative or os.path.isabs(relative):
        return None
    return inside(folder / relative, [folder.resolve()])


def file_answer(path: Path) -> Response:
    """A picture or clip that a tool wrote."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind not in ("video/mp4", "video/webm", "image/png", "image/jpeg"):
        raise HTTPException(404, "neither a clip nor a picture")
    return FileResponse(path, media_type=kind)


async def in_thread(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Blocking work of an async handler."""
    return await run_in_threadpool(function, *arguments, **keywords)
