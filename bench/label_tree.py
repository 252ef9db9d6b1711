"""Label files like the users' (size, schema, traps), and one of each defect that a label can
have. For bench and tests.

`write_label_tree` writes any number of them, fast: a handful of labels is built as JSON once,
then only the id and the date are put in.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCENE = "사람들이 움직이는 모습을 촬영한 장면입니다."
OBJECTS = [
    "노란 장화를 신은 상인이 얼음 위에 생선을 가지런히 놓는다.",
    "파란 천막 아래에서 손님 두 사람이 상자를 들여다보고 있다.",
    "갈매기 떼가 방파제 위에 앉아 바다를 바라보고 있다.",
]
_ID, _DAY = "9999999", "31 1999"
_FILES_PER_FOLDER = 5000


def make_label(
    clip_id: str,
    *,
    shots: tuple[tuple[str, str], ...] = (("00:00:00;00", "00:00:11;29"),),
    media_type: str = "video",
    length: str = "00:00:11.97",
    resolution: str | None = "1920, 1080",
    **generated: Any,
) -> dict[str, Any]:
    """A sound label of the users' schema; `generated` overrides fields of ai_generated_info."""
    captions = [
        {
            "text": OBJECTS[i % len(OBJECTS)],
            "tc_in": tc_in,
            "tc_out": tc_out,
            "token": 11,
            "sentences": 1,
        }
        for i, (tc_in, tc_out) in enumerate(shots)
    ]
    suffix = "mp4" if media_type == "video" else "png"
    return {
        "file_id": f"MBC충북_생활_{clip_id}.{suffix}",
        "source_data_info": {
            "clip_id": clip_id,
            "source_mbc": "충북",
            "broadcast_date": "Tue May 14 2019 00:00:00 GMT+0900 (Korean Standard Time)",
            "clip_proxy_url": f"https://cdn.example.org/proxy/{clip_id}.{suffix}",
            "clip_proxy_thumbnail_url": [f"https://cdn.example.org/thumb/{clip_id}_0001.jpg"],
            "ai_generated_info": {
                "stt_script": "새벽 어시장은 벌써 사람들로 붐빕니다.",
                "keyword": "어시장",
                "mid_category": "생활/문화",
                "scene_description_auto": [
                    {"tc_in": tc_in, "tc_out": tc_out, "description": SCENE}
                    for tc_in, tc_out in shots
                    if tc_in
                ],
                "auto_tags": {"ocr": ["새벽 4시"], "objects": ["사람", "상자"]},
                **generated,
            },
        },
        "labeling_data_info": {
            "caption_info": {
                "object_level": captions,
                "semantic_level": [
                    {
                        "text": "분주한 새벽 시장의 활기가 드러난다.",
                        "tc_in": "",
                        "tc_out": "",
                        "token": 7,
                        "sentences": 1,
                    }
                ],
                "application_level": [
                    {
                        "text": "지역 경제를 다루는 보도 자료로 쓸 수 있다.",
                        "tc_in": "",
                        "tc_out": "",
                        "token": 9,
                        "sentences": 1,
                    }
                ],
            }
        },
        "raw_data_info": {
            "source_media_info": {
                "media_type": media_type,
                "resolution": resolution,
                "details": {"length": length, "frame_rate": 29.97} if media_type == "video" else {},
            }
        },
    }


def label_bytes(label: dict[str, Any]) -> bytes:
    """As the users' tools write it: indented, Korean unescaped."""
    return json.dumps(label, ensure_ascii=False, indent=2).encode()


def defective_labels(clip_id: str) -> dict[str, bytes]:
    """Reason code -> a label file that must end with it under the default recipe."""

    def changed(**arguments: Any) -> bytes:
        return label_bytes(make_label(clip_id, **arguments))

    def with_caption(text: str) -> bytes:
        label = make_label(clip_id)
        label["labeling_data_info"]["caption_info"]["object_level"][0]["text"] = text
        return label_bytes(label)

    sound = changed()
    uncaptioned = make_label(clip_id, scene_description_auto=[])
    uncaptioned["labeling_data_info"]["caption_info"] = {"object_level": [], "semantic_level": None}
    return {
        "label_empty": b" \n",
        "label_not_json": sound[: len(sound) // 2],
        "label_not_object": b'["2400113"]',
        "label_not_utf8": sound.replace("생활".encode(), b"\xbb\xfd\xc8\xb0"),
        "label_wrong_type": changed(stt_script=["not", "text"]),
        "label_too_deep": sound[:-2] + b', "extra": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "label_too_large": changed(stt_script="가" * 400_000),
        "label_unsafe_id": label_bytes(make_label("../../etc/passwd")),
        "label_long_field": changed(mid_category="생활" * 200),
        "media_type_unwanted": changed(media_type="audio"),
        "caption_missing": label_bytes(uncaptioned),
        "caption_repeated_word": with_caption("정말 " * 12 + "크다."),
        "caption_repeated_char": with_caption("하" * 18 + " 웃는다."),
        "caption_special_chars": with_caption("★☆◆◇■□▲△▼▽" * 8),
        "duration_short": changed(length="00:00:01.50"),
        "duration_long": changed(length="00:39:43.65"),
        "resolution_unknown": changed(resolution="unknown"),
        "timecode_invalid": changed(shots=(("00:01:00;00", "00:01:05;00"),)),
        "timecode_reversed": changed(shots=(("00:00:05;00", "00:00:02;00"),)),
    }


def _templates() -> list[bytes]:
    """Sound labels with the field's traps, all with one id, which each generated label replaces."""
    two, three = (
        (("00:00:00;00", "00:00:08;14"), ("00:00:08;15", "00:00:19;22")),
        (
            ("00:00:14;03", "00:00:21;06"),
            ("00:00:00;00", "00:00:08;00"),
            ("00:00:08;01", "00:00:14;02"),
        ),
    )
    labels = [
        make_label(_ID),
        make_label(_ID, shots=two, length="00:00:19.75"),
        make_label(_ID, shots=three, length="00:00:21.24", keyword=None),
        make_label(_ID, stt_script=""),
        make_label(_ID, shots=(("", ""),), media_type="image"),
    ]
    nested = make_label(_ID, resolution=None)
    nested["raw_data_info"]["raw_data_info"] = {"basic_info": {"resolution": "720, 512"}}
    quoted = make_label(_ID)
    quoted["labeling_data_info"]["caption_info"]["object_level"][0]["text"] += (
        '\n현수막에 "축제"라고 적혀 있다.'
    )
    return [
        label_bytes(label).replace(b"14 2019", _DAY.encode()) for label in [*labels, nested, quoted]
    ]


def label_files(num_labels: int) -> Iterator[tuple[str, bytes]]:
    """(relative path, bytes) of sound labels with ids from 3000000 on; about 2.2 KB each."""
    templates = _templates()
    for number in range(num_labels):
        clip_id = str(3_000_000 + number)
        day = f"{1 + number // 100 % 28:02} {2000 + number // 3000 % 20}"
        data = (
            templates[number % len(templates)]
            .replace(_ID.encode(), clip_id.encode())
            .replace(_DAY.encode(), day.encode())
        )
        kind = "image" if number % len(templates) == 4 else "video"
        yield f"{kind}/batch_{number // _FILES_PER_FOLDER:04}/{clip_id}.json", data


def write_label_tree(root: Path, num_labels: int) -> None:
    """Write `num_labels` sound labels below `root`."""
    for path, data in label_files(num_labels):
        target = root / path
        try:
            target.write_bytes(data)
        except FileNotFoundError:
            target.parent.mkdir(parents=True)
            target.write_bytes(data)
