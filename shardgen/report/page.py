"""The quality report as one HTML page that needs nothing but itself: figures, bars, and examples
with their frames.

Korean stands beside English. The plots are bars drawn with CSS, so the page needs no script, no
font and no network. What it looks like is page.html, a jinja2 template: every text that goes in is
escaped, because labels and file names are not ours.
"""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec

from loader.files import write_atomic
from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.database import CatalogError
from shardgen.catalog.rows import Clip
from shardgen.catalog.tables import FINAL, UNREADABLE
from shardgen.media.decode import decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.local import find_local
from shardgen.media.pictures import encode_jpeg
from shardgen.media.probe import probe
from shardgen.report.figures import Check
from shardgen.report.labels_ko_en import CHECKS, wording

TEMPLATE_FILE, PAGE_FILE = "page.html", "report.html"
_THUMBNAIL = Bucket(224, 128, 1)  # only ever looked at
_SPLITS = ("accepted_train", "accepted_val")


class Kind(NamedTuple):
    """What became of a clip."""

    status: str
    reason: str


class Example(NamedTuple):
    """A clip that stands for its kind: what it says, and base64 JPEGs of its beginning, middle
    and end.
    """

    kind: Kind
    clip_id: str
    label: str
    detail: str
    caption: str
    pictures: list[str]


class Bar(NamedTuple):
    """A row of a plot, named by codes or by a text. `share` is of the plot's longest bar."""

    text: str
    codes: tuple[str, ...]
    num: int
    share: float


class Plot(NamedTuple):
    """Bars under a title."""

    english: str
    korean: str
    rows: list[Bar]


def write_page(dataset: Path, report: Mapping[str, Any], root: Path) -> Path:
    """Write report.html into `dataset` from its report and catalog; returns the path. `root` is
    the label tree.

    Raises OSError or CatalogError if one of them is not there.
    """
    with Catalog.open_read_only(dataset / "catalog.sqlite") as catalog:
        examples = collect_examples(catalog, root)
    checks = msgspec.convert(report["checks"], list[Check])
    path = dataset / PAGE_FILE
    write_atomic(path, render_page(report, checks, examples).encode())
    return path


def render_page(report: Mapping[str, Any], checks: list[Check], examples: list[Example]) -> str:
    """The whole page, from the decoded quality_report.json."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        files(__package__).joinpath(TEMPLATE_FILE).read_text("utf-8")
    )
    statuses = [status for status in FINAL if report["statuses"][status]]
    categories = report["categories"]
    in_splits = {name: sum(counts[name] for counts in categories.values()) for name in _SPLITS}
    total = {**report["statuses"], "total": report["label_files"], **in_splits}
    kinds = groupby(examples, key=lambda example: example.kind)
    return template.render(
        report=report,
        statuses=statuses,
        columns=[*statuses, "total", *_SPLITS],
        categories=[*categories.items(), ("total", total)],
        checks=checks,
        korean_of_checks=CHECKS,
        plots=list(_plots(report)),
        examples=[(kind, list(clips)) for kind, clips in kinds],
        wording=wording,
    )


def _plots(report: Mapping[str, Any]) -> Iterator[Plot]:
    reasons: dict[tuple[str, ...], int] = {
        (status, reason): count
        for status, counts in report["reasons"].items()
        for reason, count in counts.items()
    }
    yield _plot_of_codes("Reasons", "사유", reasons)
    flags: dict[tuple[str, ...], int] = {(name,): count for name, count in report["flags"].items()}
    yield _plot_of_codes("Flags", "표시", flags)

    lengths = {
        int(length): count for length, count in report["accepted_videos_by_whole_seconds"].items()
    }
    every_second = {
        str(length): lengths.get(length, 0) for length in range(max(lengths, default=-1) + 1)
    }
    yield _plot_of_texts("Length of accepted videos, s", "채택된 영상의 길이(초)", every_second)
    sizes = {
        f"{each['declared']} → {each['probed']}": each["clips"]
        for each in report["declared_against_probed_size"][:20]
    }
    yield _plot_of_texts("Size: declared → probed", "해상도: 라벨 → 실제", sizes)
    samples = {
        f"{split} {bucket}": count
        for split, counts in report["samples"].items()
        for bucket, count in counts.items()
    }
    yield _plot_of_texts("Samples", "표본", samples)


def _plot_of_codes(english: str, korean: str, counts: Mapping[tuple[str, ...], int]) -> Plot:
    most = max(counts.values(), default=0) or 1
    rows = [Bar("", codes, count, count / most) for codes, count in counts.items()]
    return Plot(english, korean, rows)


def _plot_of_texts(english: str, korean: str, counts: Mapping[str, int]) -> Plot:
    most = max(counts.values(), default=0) or 1
    rows = [Bar(text, (), count, count / most) for text, count in counts.items()]
    return Plot(english, korean, rows)


def collect_examples(catalog: Catalog, root: Path, per_kind: int = 3) -> list[Example]:
    """The first few clips of each status and reason, in path order. `root` is the label tree."""
    taken: Counter[Kind] = Counter()
    examples = []
    for clip in catalog.clips():
        kind = Kind(clip.status, clip.reason)
        if taken[kind] == per_kind:
            continue
        taken[kind] += 1
        caption = "" if clip.status == UNREADABLE else _caption(catalog, clip)
        pictures = [base64.b64encode(data).decode() for data in _pictures(catalog, root, clip)]
        examples.append(Example(kind, clip.clip_id, clip.label, clip.detail, caption, pictures))
    return sorted(examples, key=lambda each: (FINAL.index(each.kind.status), each.kind.reason))


def _caption(catalog: Catalog, clip: Clip) -> str:
    label = catalog.labels.read(clip.id)
    sentences = [scene.text for scene in label.scenes] + [each.text for each in label.objects]
    return "\n".join(sentences)


def _pictures(catalog: Catalog, root: Path, clip: Clip) -> list[bytes]:
    """JPEGs of beginning, middle and end of the clip; none where its media are missing, gone or
    rotten: words must do then.
    """
    try:
        if clip.media_xxh3:
            path = catalog.media.path(clip.media_xxh3)
        elif local := find_local(root / clip.label, clip.clip_id, clip.media_type):
            path = local
        else:
            return []
        found = probe(path)
        shares = (0.0,) if found.num_frames == 1 else (0.05, 0.5, 0.95)
        length_s = found.duration_s - found.start_s
        starts_ms = [int((found.start_s + length_s * share) * 1000) for share in shares]
        frames = dict(decode_windows(path, starts_ms, 24.0, _THUMBNAIL))
    except (CatalogError, MediaError):
        return []
    return [encode_jpeg(frames[index][0], 80) for index in sorted(frames)]
