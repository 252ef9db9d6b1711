"""Each rule has its reason code, its limit is a limit, and 0 switches it off."""

import msgspec
import pytest

from bench.label_tree import label_bytes, make_label
from shardgen.labels.parse import parse_label
from shardgen.rules.config import FiltersConfig
from shardgen.rules.quality import Scores, judge_label, judge_media, score_caption

OFF = FiltersConfig(
    min_duration_s=0,
    max_duration_s=0,
    min_caption_chars=0,
    max_word_run=0,
    max_char_run=0,
    max_special_share=0,
    require_resolution=False,
)
GOOD = Scores(100, 1, 2, 0.0)
LABEL = parse_label(label_bytes(make_label("2400101", length="00:00:10.00")))


def reason(filters: FiltersConfig, scores: Scores = GOOD, **label: object) -> str:
    verdict = judge_label(msgspec.structs.replace(LABEL, **label), "video", scores, filters)
    return verdict.reason if verdict else ""


@pytest.mark.parametrize(
    ("threshold", "inside", "outside", "code"),
    [
        ({"min_duration_s": 10.0}, {}, {"duration_s": 9.99}, "duration_short"),
        ({"max_duration_s": 10.0}, {}, {"duration_s": 10.01}, "duration_long"),
        (
            {"require_resolution": True},
            {},
            {"width_px": None, "height_px": None},
            "resolution_unknown",
        ),
        (
            {"min_caption_chars": 50},
            {"scores": GOOD._replace(caption_chars=50)},
            {"scores": GOOD._replace(caption_chars=49)},
            "caption_short",
        ),
        (
            {"max_caption_chars": 1500},
            {"scores": GOOD._replace(caption_chars=1500)},
            {"scores": GOOD._replace(caption_chars=1501)},
            "caption_long",
        ),
        (
            {"max_word_run": 9},
            {"scores": GOOD._replace(word_run=9)},
            {"scores": GOOD._replace(word_run=10)},
            "caption_repeated_word",
        ),
        (
            {"max_char_run": 14},
            {"scores": GOOD._replace(char_run=14)},
            {"scores": GOOD._replace(char_run=15)},
            "caption_repeated_char",
        ),
        (
            {"max_special_share": 0.3},
            {"scores": GOOD._replace(special_share=0.3)},
            {"scores": GOOD._replace(special_share=0.31)},
            "caption_special_chars",
        ),
    ],
)
def test_a_rule_holds_at_its_limit_and_is_off_at_0(
    threshold: dict[str, object], inside: dict[str, object], outside: dict[str, object], code: str
) -> None:
    filters = msgspec.structs.replace(OFF, **threshold)
    assert reason(filters, **inside) == ""  # type: ignore[arg-type]
    assert reason(filters, **outside) == code  # type: ignore[arg-type]
    assert reason(OFF, **outside) == ""  # type: ignore[arg-type]


def test_no_caption_is_a_reason_under_every_recipe() -> None:
    assert reason(OFF, Scores(0, 0, 0, 0.0)) == "caption_missing"
    verdict = judge_label(LABEL, "audio", GOOD, OFF)
    assert verdict is not None and verdict.reason == "media_type_unwanted"


def test_scores_count_words_and_characters_in_a_row() -> None:
    assert score_caption("정말 " * 12 + "크다.")[:3] == (39, 12, 1)
    assert score_caption("하" * 18 + " 웃는다.").char_run == 18
    assert score_caption("비가 온다. 비가 온다. 비가 온다.").word_run == 1
    assert score_caption("a aa aaa  b").char_run == 3
    assert score_caption("★★★a").special_share == 0.75
    assert score_caption('그는 "네"라고 (크게) 말했다. 3.5%?').special_share == 0.0
    assert score_caption("") == Scores(0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("probed", "expected"),
    [
        (("video", 10.0, 854, 480, 1.5), None),
        (("video", 31.5, 854, 480, 1.5), ("duration_long", "10.00 s", "31.50 s")),
        (("video", 2.5, 854, 480, 1.5), ("duration_short", "10.00 s", "2.50 s")),
        (("video", 10.0, 640, 360, 1.5), ("picture_small", "1920x1080", "640x360")),
        (("video", 10.0, 854, 480, 1.51), ("upscale_large", "1920x1080", "854x480")),
        (("image", 0.0, 854, 480, 1.5), ("media_type_differs", "video", "image")),
    ],
)
def test_the_media_decide_and_both_values_are_recorded(
    probed: tuple[str, float, int, int, float], expected: tuple[str, str, str] | None
) -> None:
    verdict = judge_media(
        "video", 10.0, "1920x1080", *probed, FiltersConfig(min_short_side_px=480, max_upscale=1.5)
    )
    assert (verdict and (verdict.reason, verdict.declared, verdict.probed)) == expected


def test_a_length_that_the_label_does_not_know_is_the_probe_s_to_judge() -> None:
    assert reason(FiltersConfig(min_duration_s=3.0, max_duration_s=10.0), duration_s=None) == ""
