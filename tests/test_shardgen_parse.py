"""Every field is read, and hostile bytes are refused by name."""

import json
import tracemalloc
from typing import Any

import pytest

from bench.label_tree import defective_labels, label_bytes, make_label
from shardgen.labels.nesting import is_too_deep
from shardgen.labels.parse import LabelError, parse_label
from shardgen.labels.timecode import TimecodeError, timecode_frame


def parse(label: dict[str, Any]) -> Any:
    return parse_label(label_bytes(label))


@pytest.mark.parametrize(
    "raw",
    [
        {"source_media_info": {"resolution": "1920, 1080"}},
        {"source_media_info": {"details": {"resolution": "1920,1080"}}},
        {"source_media_info": {}, "basic_info": {"resolution": "1920 x 1080"}},
        {"raw_data_info": {"basic_info": {"resolution": " 1920, 1080 "}}},
        {
            "source_media_info": {"resolution": "unknown"},
            "basic_info": {"resolution": "1920, 1080"},
        },
    ],
)
def test_the_resolution_is_read_from_each_of_its_four_places(raw: dict[str, Any]) -> None:
    label = parse(make_label("2400101") | {"raw_data_info": raw})
    assert (label.width_px, label.height_px) == (1920, 1080)


@pytest.mark.parametrize(
    "text", ["unknown", "", None, "0, 1080", "1920", "1920, 1080, 3", "-1920, 1080"]
)
def test_what_is_no_resolution_is_unknown(text: str | None) -> None:
    assert parse(make_label("2400101", resolution=text)).width_px is None


def test_fields_that_the_users_leave_out_read_as_empty() -> None:
    label = parse({"source_data_info": {"clip_id": "2400110"}})
    assert label.keyword == label.stt_script == label.category == label.broadcast_date == ""
    assert label.scenes == label.objects == label.semantic == label.thumbnail_urls == []
    assert label.width_px is label.duration_s is label.fps is None


def test_nulls_newlines_and_quotes_survive() -> None:
    made = make_label("2400101", keyword=None, stt_script='그는 "네"라고\n말했다')
    made["labeling_data_info"]["caption_info"]["application_level"] = None
    label = parse(made)
    assert (label.keyword, label.stt_script, label.application) == ("", '그는 "네"라고\n말했다', [])


@pytest.mark.parametrize(
    "reason",
    [
        reason
        for reason in defective_labels("2400101")
        if reason.startswith("label_") and reason != "label_too_large"
    ],
)
def test_a_label_that_cannot_be_read_says_why(reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        parse_label(defective_labels("2400101")[reason])
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1000


def test_the_byte_offset_points_at_the_fault() -> None:
    data = label_bytes(make_label("2400101"))
    for bad, at in [
        (data.replace(b'"token"', b'"text": 5, "token"', 1), b"5, "),
        (data.replace(b'"source_mbc": ', b'"source_mbc": {"x": 1}, "y": '), b'{"x"'),
        (data.replace("충북".encode(), b"\xff"), b"\xff"),
        (data.replace(b'"keyword":', b'"keyword"'), '"어시장"'.encode()),
    ]:
        with pytest.raises(LabelError) as caught:
            parse_label(bad)
        assert caught.value.byte_offset == bad.index(at)
    with pytest.raises(LabelError) as caught:
        parse_label(data[:700])
    assert (caught.value.reason, caught.value.byte_offset) == ("label_not_json", 700)


def test_long_texts_of_hostile_labels_are_not_kept_in_memory() -> None:
    def parse_long(number: int) -> None:
        long = f"{number}" + "9" * 500_000
        parsed = parse(make_label("2400101", length=long, resolution=long, shots=((long, long),)))
        assert (parsed.duration_s, parsed.width_px, len(parsed.objects[0].tc_in)) == (
            None,
            None,
            500_002,
        )
        with pytest.raises(TimecodeError):
            timecode_frame(parsed.objects[0].tc_in)

    parse_long(10)
    tracemalloc.start()
    for number in range(11, 21):
        parse_long(number)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 1_000_000


@pytest.mark.parametrize(
    "clip_id", ["", "../x", "a/b", "a\\b", ".hidden", "x" * 65, "a\0b", "a b", "-rf"]
)
def test_an_id_that_could_leave_its_folder_is_refused(clip_id: str) -> None:
    with pytest.raises(LabelError) as caught:
        parse(make_label(clip_id))
    assert caught.value.reason == "label_unsafe_id"


def test_two_faults_in_one_label_are_one_reason() -> None:
    # CP949; and an id that leaves
    data = label_bytes(make_label("../x")).replace(b"{", b'{"\xb4\xba": 1, ', 1)
    with pytest.raises(LabelError) as caught:
        parse_label(data)
    assert (caught.value.reason, caught.value.byte_offset) == ("label_unsafe_id", None)


def test_names_stand_in_tables_so_they_are_short_and_on_one_line() -> None:
    label = parse(make_label("2400101", mid_category=" 생활\u3000문화\n\x1b[31m\0"))
    assert label.category == "생활 문화 [31m"
    for field in ("source_mbc", "media_type"):
        hostile = json.dumps(make_label("2400101")).replace(
            f'"{field}": "', f'"{field}": "{"가" * 201}'
        )
        with pytest.raises(LabelError, match=field) as caught:
            parse_label(hostile.encode())
        assert caught.value.reason == "label_long_field" and caught.value.byte_offset is not None
        assert hostile.encode()[caught.value.byte_offset :].decode().startswith('"가가')


def test_wrong_types_anywhere_are_refused_and_never_crash() -> None:
    def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        return [path, *(place for key, each in inner for place in places(each, (*path, key)))]

    refused = 0
    for path in places(make_label("2400101"))[1:]:
        wrongs: list[Any] = [17, [[]], {"x": {}}, True, "text", None, 10**400]
        for wrong in wrongs:
            label = make_label("2400101")
            *parents, last = path
            target: Any = label
            for key in parents:
                target = target[key]
            target[last] = wrong
            try:
                parse_label(json.dumps(label).encode())
            except LabelError as error:
                assert error.reason in ("label_wrong_type", "label_unsafe_id", "label_not_json")
                assert error.byte_offset is not None
                refused += 1
    assert refused > 100


def test_a_byte_order_mark_is_no_fault_and_moves_no_offset() -> None:
    data = label_bytes(make_label("2400101"))
    assert parse_label(b"\xef\xbb\xbf" + data) == parse_label(data)
    bad = b"\xef\xbb\xbf" + data.replace(b'"token"', b'"text": 5, "token"', 1)
    with pytest.raises(LabelError) as caught:
        parse_label(bad)
    assert caught.value.byte_offset == bad.index(b"5, ")
    with pytest.raises(LabelError) as caught:
        parse_label(b"\xef\xbb\xbf")
    assert caught.value.reason == "label_empty"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_unknown(number: str) -> None:
    made = make_label("2400101", keyword='"NaN" und \\ Infinity')
    text = json.dumps(made | {"score": 1.5}, ensure_ascii=False)
    assert parse_label(text.replace("1.5", number).encode()) == parse(made)
    made["raw_data_info"]["source_media_info"]["details"]["frame_rate"] = "@"
    made["labeling_data_info"]["caption_info"]["semantic_level"] = "@"
    label = parse_label(json.dumps(made).replace('"@"', number).encode())
    assert label.fps is None and label.semantic == []
    assert label.keyword == '"NaN" und \\ Infinity'
    with pytest.raises(LabelError) as caught:
        parse_label(text.replace("1.5", f"{number}x").encode())
    assert caught.value.reason == "label_not_json"


def test_what_says_nothing_in_a_list_of_captions_loses_no_label() -> None:
    made = make_label("2400101")
    sound = parse(made)
    info = made["labeling_data_info"]["caption_info"]
    for level in ("object_level", "semantic_level", "application_level"):
        info[level] = [None, *info[level], 5, 1.5, True, "", "ein Satz", {}]
    scenes = made["source_data_info"]["ai_generated_info"]
    scenes["scene_description_auto"] = [None, *scenes["scene_description_auto"], 7]
    made["source_data_info"]["clip_proxy_thumbnail_url"] = [None, "https://a/b.jpg"]
    label = parse(made)
    assert label.scenes == sound.scenes
    assert label.objects[:-1] == sound.objects and label.objects[-1].text == "ein Satz"
    assert label.semantic == [*sound.semantic, "ein Satz"]
    assert label.application == [*sound.application, "ein Satz"]
    assert label.thumbnail_urls == ["https://a/b.jpg"]


@pytest.mark.parametrize(
    ("tags", "read"),
    [
        ({"ocr": ["새벽 4시", "", None, 7, "속보"]}, ["새벽 4시", "속보"]),
        ({"ocr": "속보"}, ["속보"]),
        ({"ocr": None}, []),
        ({"ocr": 5}, []),
        ({"ocr": {"a": 1}}, []),
        (None, []),
        (["속보"], []),
        ("x", []),
    ],
)
def test_the_text_in_the_picture_is_read_or_empty_but_loses_no_label(
    tags: Any, read: list[str]
) -> None:
    made = make_label("2400101")
    made["source_data_info"]["ai_generated_info"]["auto_tags"] = tags
    assert parse(made).ocr == read


@pytest.mark.parametrize(
    ("declared", "read"),
    [
        ("1920*1080", (1920, 1080)),
        ("1920 × 1080 px", (1920, 1080)),
        ("1920x1080p", (1920, 1080)),
        ([1920, 1080], (1920, 1080)),
        (1080, (None, None)),
        ({"width": 1920}, (None, None)),
        ([1, 2, 3], (None, None)),
        ("1080p", (None, None)),
    ],
)
def test_a_declared_size_is_read_or_unknown_but_loses_no_label(
    declared: Any, read: tuple[int | None, int | None]
) -> None:
    label = parse(make_label("2400101", resolution=declared))
    assert (label.width_px, label.height_px) == read


@pytest.mark.parametrize(
    ("declared", "length_s"),
    [
        ("00:00:04", 4.0),
        ("00:00:04.125", 4.125),
        (4, 4.0),
        (4.5, 4.5),
        (-1, None),
        (True, None),
        ([4], None),
        ("four", None),
        (10**400, None),
    ],
)
def test_a_declared_length_is_read_or_unknown_but_loses_no_label(
    declared: Any, length_s: float | None
) -> None:
    assert parse(make_label("2400101", length=declared)).duration_s == length_s


@pytest.mark.parametrize("value", [5, "x", [], ["x", 5, None], [{}], {"x": 1}, True])
def test_what_no_rule_uses_loses_no_label_whatever_stands_there(value: Any) -> None:
    made = make_label("2400101")
    source, raw = made["source_data_info"], made["raw_data_info"]
    source |= {"clip_proxy_thumbnail_url": value, "broadcast_date": value}
    source["ai_generated_info"]["keyword"] = value
    label, texts = parse(made), [text for text in ("x",) if value in ("x", ["x", 5, None])]
    assert label.broadcast_date == ""
    assert label.thumbnail_urls == texts and label.keyword == "".join(texts)
    if isinstance(value, dict):
        return
    # where an object is empty some exporters write a list
    for place in (raw["source_media_info"]["details"], raw):
        place.clear()
    raw |= {"source_media_info": {"details": value}, "basic_info": value, "raw_data_info": value}
    label = parse(made)
    assert label.width_px is label.duration_s is label.fps is None
    assert parse(made | {"raw_data_info": value}).width_px is None
    basic = {"basic_info": {"resolution": value}}
    assert parse(made | {"raw_data_info": basic | {"raw_data_info": basic}}).width_px is None
    assert parse(made | {"raw_data_info": {"source_media_info": value}}).media_type == ""


def test_several_keywords_are_one_text() -> None:
    assert parse(make_label("2400101", keyword=["어시장", "새벽"])).keyword == "어시장, 새벽"


def test_brackets_in_strings_are_not_nesting() -> None:
    assert not is_too_deep(b'{"a": "' + b"[" * 500 + rb"\"[" + b'"}')
    assert not is_too_deep(b"[" + b"[], " * 500 + b"[]]")
    assert is_too_deep(b"[" * 201 + b"]" * 201) and not is_too_deep(b"[" * 200 + b"]" * 200)
