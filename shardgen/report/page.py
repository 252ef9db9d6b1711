"""The quality report as one HTML page that needs nothing but itself: figures, bars, and examples
with their frames.

Korean stands beside English. The plots are bars drawn with CSS, so the page needs no script, no
font and no network.
"""

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loader.config import load_toml
from loader.files import write_atomic
from loader.shape import Bucket
from shardgen.catalog.catalog import Catalog, CatalogError
from shardgen.catalog.tables import FINAL, UNREADABLE
from shardgen.config import ShardgenConfig
from shardgen.media.decode import decode_windows
from shardgen.media.errors import MediaError
from shardgen.media.local import find_local
from shardgen.media.pictures import encode_jpeg
from shardgen.media.probe import probe
from shardgen.report.figures import Check
from shardgen.report.wording import CHECKS, wording

_THUMBNAIL = Bucket(224, 128, 1)  # only ever looked at
_STYLE = """
body{font:15px/1.5 system-ui,'Noto Sans KR','Malgun Gothic',sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5em 0 1.5em}
td,th{padding:.15em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}.text{min-width:16em}
.bars{width:420px}.bar{background:#3b7dd8;height:.9em;margin-top:.3em;min-width:1px}
.ko,:lang(ko){word-break:keep-all;overflow-wrap:break-word}.ko{color:#666}.yes{color:#18794e}.no{color:#b3261e}
.clip{border:1px solid #ddd;border-radius:6px;padding:.6em;margin:.6em 0}.clip img{margin-right:4px;max-width:100%}
h3{margin:1.6em 0 .2em}code{color:#555}
"""
_SPLITS = ("accepted_train", "accepted_val")
_REACHED = {
    True: " <b class=yes>reached</b> <span class=ko>달성</span>",
    False: " <b class=no>missed</b> <span class=ko>미달</span>",
    None: "",
}


class Example(NamedTuple):
    """A clip that stands for a status and reason: what it says, and JPEGs of its beginning,
    middle and end.
    """

    status: str
    reason: str
    clip_id: str
    label: str
    detail: str
    caption: str
    pictures: list[bytes]


def collect_examples(catalog: Catalog, root: Path, per_reason: int = 3) -> list[Example]:
    """The first few clips of each status and reason, in path order. `root` is the label tree."""
    taken: Counter[tuple[str, str]] = Counter()
    examples = []
    for row in catalog.clips():
        kind = row["status"], row["reason"]
        if taken[kind] < per_reason:
            taken[kind] += 1
            caption = ""
            if row["status"] != UNREADABLE:
                label = catalog.label(row["id"])
                caption = "\n".join(
                    [
                        *(scene.text for scene in label.scenes),
                        *(each.text for each in label.objects),
                    ]
                )
            examples.append(
                Example(
                    *kind,
                    row["clip_id"],
                    row["label"],
                    row["detail"],
                    caption,
                    _pictures(catalog, root, row),
                )
            )
    return sorted(examples, key=lambda example: (FINAL.index(example.status), example.reason))


def _pictures(catalog: Catalog, root: Path, row: Any) -> list[bytes]:
    """Beginning, middle and end of the clip; none where its media are missing, gone or rotten:
    words must do then.
    """
    try:
        path = (
            catalog.media_path(row["media_xxh3"])
            if row["media_xxh3"]
            else find_local(root / row["label"], row["clip_id"], row["media_type"])
        )
        if path is None:
            return []
        found = probe(path)
        shares = (0.0,) if found.num_frames == 1 else (0.05, 0.5, 0.95)
        starts_ms = [int(found.duration_s * share * 1000) for share in shares]
        frames = dict(decode_windows(path, starts_ms, 24.0, _THUMBNAIL))
    except (CatalogError, MediaError):
        return []
    return [encode_jpeg(frames[index][0], 80) for index in sorted(frames)]


def render_page(report: Mapping[str, Any], checks: list[Check], examples: list[Example]) -> str:
    """The whole page, from the decoded quality_report.json."""
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>newsreel: data quality</title>",
            "<meta name=viewport content='width=device-width'>",
            f"<style>{_STYLE}</style><h1>Data quality <span class=ko>데이터 품질</span></h1>",
            *_counts(report),
            *_checks(checks),
            *_plots(report),
            *_examples(examples),
            "</html>",
            "",
        ]
    )


def _counts(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2>{report['label_files']} label files <span class=ko>라벨 파일</span></h2>"
    statuses = [status for status in FINAL if report["statuses"][status]]
    head = "".join(f"<th class=n>{_both(status)}" for status in statuses)
    yield (
        f"<div class=wide><table><tr><th>category <span class=ko>분류</span>{head}<th class=n>total "
        f"<span class=ko>합계</span><th class=n>accepted: train <span class=ko>학습</span><th class=n>val "
        f"<span class=ko>검증</span>"
    )
    in_split = {
        name: sum(counts[name] for counts in report["categories"].values()) for name in _SPLITS
    }
    total = {**report["statuses"], "total": report["label_files"], **in_split}
    for name, counts in (*report["categories"].items(), ("total", total)):
        cells = "".join(
            f"<td class=n>{counts[column]}" for column in (*statuses, "total", *_SPLITS)
        )
        yield f"<tr><td>{escape(name or '-')}{cells}"
    yield "</table></div>"
    programmes = report["programmes"]
    both = escape(", ".join(programmes["on_both_sides"])) or "none <span class=ko>없음</span>"
    yield (
        f"<p>Programmes <span class=ko>프로그램</span>: {programmes['train']} train, {programmes['val']} val; "
        f"on both sides <span class=ko>양쪽에 모두 있는 것</span>: {both}</p>"
    )


def _checks(checks: list[Check]) -> Iterator[str]:
    head = (
        f"<th{kind}>{english} <span class=ko>{korean}</span>"
        for kind, english, korean in (
            ("", "check", "점검 항목"),
            (" class=n", "value", "값"),
            ("", "target", "목표"),
            (" class=n", "n", "표본"),
            ("", "definition", "정의"),
        )
    )
    yield f"<h2>Checks <span class=ko>점검</span></h2><div class=wide><table><tr>{''.join(head)}"
    for check in checks:
        unit = "" if isinstance(check.value, str) else f" {check.unit}"
        korean, definition = CHECKS[check.name]
        yield (
            f"<tr><td>{escape(check.name)} <span class=ko>{korean}</span>"
            f"<td class=n>{check.value}{escape(unit)}<td>{escape(check.target)}{_REACHED[check.reached]}"
            f"<td class=n>{check.sample_size}<td class=text>{escape(check.definition)}<br>"
            f"<span class=ko>{definition}</span>"
        )
    yield "</table></div>"


def _plots(report: Mapping[str, Any]) -> Iterator[str]:
    yield from _bars(
        "Reasons",
        "사유",
        {
            f"{_both(status)}: {_both(reason)}": count
            for status, counts in report["reasons"].items()
            for reason, count in counts.items()
        },
    )
    yield from _bars(
        "Flags", "표시", {_both(name): count for name, count in report["flags"].items()}
    )
    lengths = {
        int(length): count for length, count in report["accepted_videos_by_whole_seconds"].items()
    }
    yield from _bars(
        "Length of accepted videos, s",
        "채택된 영상의 길이(초)",
        {str(length): lengths.get(length, 0) for length in range(max(lengths, default=-1) + 1)},
    )
    yield from _bars(
        "Size: declared → probed",
        "해상도: 라벨 → 실제",
        {
            f"{each['declared']} → {each['probed']}": each["clips"]
            for each in report["declared_against_probed_size"][:20]
        },
    )
    yield from _bars(
        "Samples",
        "표본",
        {
            f"{split} {bucket}": count
            for split, counts in report["samples"].items()
            for bucket, count in counts.items()
        },
    )


def _bars(english: str, korean: str, counts: Mapping[str, int]) -> Iterator[str]:
    yield f"<h3>{english} <span class=ko>{korean}</span></h3><div class=wide><table>"
    most = max(counts.values(), default=1) or 1
    for name, count in counts.items():
        bar = f"<div class=bar style='width:{100 * count / most:.1f}%'></div>" if count else ""
        yield f"<tr><td>{name}<td class=n>{count}<td><div class=bars>{bar}</div>"
    yield "</table></div>" if counts else "<tr><td>none <span class=ko>없음</span></table></div>"


def _examples(examples: list[Example]) -> Iterator[str]:
    yield "<h2>Examples <span class=ko>예시</span></h2>"
    last = None
    for example in examples:
        if (example.status, example.reason) != last:
            last = example.status, example.reason
            reason = f": {_both(example.reason)}" if example.reason else ""
            yield f"<h3>{_both(example.status)}{reason} <code>{escape(example.reason)}</code></h3>"
        images = "".join(
            f"<img src='data:image/jpeg;base64,{base64.b64encode(data).decode()}'>"
            for data in example.pictures
        )
        caption = escape(example.caption).replace("\n", "<br>")
        yield (
            f"<div class=clip>{images}<div><b>{escape(example.clip_id)}</b> {escape(example.label)} "
            f"<i>{escape(example.detail)}</i></div><div lang=ko>{caption}</div></div>"
        )


def _both(code: str) -> str:
    english, korean = wording(code)
    return f"{escape(english)} <span class=ko>{escape(korean)}</span>"


def write_page(dataset: Path, report: Mapping[str, Any]) -> Path:
    """Write report.html into `dataset` from its report, catalog and config.toml; returns the path.

    Raises OSError or ConfigError if one of them is not there.
    """
    root = Path(load_toml(dataset / "config.toml", ShardgenConfig).labels.root)
    with Catalog(dataset / "catalog.sqlite") as catalog:
        examples = collect_examples(catalog, root)
    checks = msgspec.convert(report["checks"], list[Check])
    path = dataset / "report.html"
    write_atomic(path, render_page(report, checks, examples).encode())
    return path
