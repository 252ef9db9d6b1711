"""A label's timecodes become shots in time order, each with its own sentences; frames that two
shots claim belong to neither.
"""

import random

import pytest

from bench.label_tree import OBJECTS, SCENE, label_bytes, make_label
from shardgen.labels.parse import Label, Timed, parse_label
from shardgen.rules.shots import (
    PlanError,
    Shot,
    clamp_shots,
    exclusive_ranges,
    first_frame,
    last_frame,
    shots_of,
)


def label(*shots: tuple[str, str], scenes: tuple[Timed, ...] | None = None) -> Label:
    read = parse_label(label_bytes(make_label("2400101", shots=shots)))
    return (
        read
        if scenes is None
        else Label(
            **{name: getattr(read, name) for name in read.__struct_fields__}
            | {"scenes": list(scenes)}
        )
    )


def shot(first: int, last: int) -> Shot:
    return Shot(first, last, [], [])


def test_shots_come_in_time_order_with_their_own_sentences() -> None:
    shots = shots_of(
        label(
            ("00:00:14;03", "00:00:21;06"),
            ("00:00:00;00", "00:00:08;00"),
            ("00:00:08;01", "00:00:14;02"),
        )
    )
    assert [(each.first, each.last) for each in shots] == [(0, 240), (241, 422), (423, 636)]
    assert [each.objects for each in shots] == [[OBJECTS[1]], [OBJECTS[2]], [OBJECTS[0]]]
    assert [each.scenes for each in shots] == [[SCENE]] * 3


def test_a_scene_belongs_to_the_shots_that_it_mostly_covers() -> None:
    whole, half = (
        Timed("전체.", "00:00:00;00", "00:00:19;29"),
        Timed("끝.", "00:00:12;00", "00:00:19;29"),
    )
    shots = shots_of(
        label(("00:00:00;00", "00:00:09;29"), ("00:00:10;00", "00:00:19;29"), scenes=(whole, half))
    )
    assert [each.scenes for each in shots] == [["전체."], ["전체.", "끝."]]
    untimed = shots_of(label(("00:00:00;00", "00:00:09;29"), scenes=(Timed("언제나."),)))
    assert untimed[0].scenes == ["언제나."]
    assert [
        each.scenes
        for each in shots_of(
            label(
                ("00:00:00;00", "00:00:01;00"),
                ("00:00:02;00", "00:00:03;00"),
                scenes=(Timed("언제나."),),
            )
        )
    ] == [[], []]


def test_scene_ranges_are_the_shots_where_the_object_level_has_none() -> None:
    shots = shots_of(label(("", ""), scenes=(Timed("장면.", "00:00:01;00", "00:00:02;00"),)))
    assert shots == [Shot(30, 60, ["장면."], [OBJECTS[0]])]
    assert shots_of(label(("", ""), scenes=())) == []


def test_one_frame_past_the_probed_end_is_clamped_and_two_are_a_reason() -> None:
    duration_s = 592 * 1001 / 30000  # frames 0..591
    assert last_frame(duration_s) == last_frame(round(duration_s, 3)) == 591
    assert (
        clamp_shots([shot(0, 591)], duration_s)
        == clamp_shots([shot(0, 592)], duration_s)
        == [shot(0, 591)]
    )
    for wrong in (shot(0, 593), shot(592, 592)):
        with pytest.raises(PlanError) as caught:
            clamp_shots([wrong], duration_s)
        assert (caught.value.reason, caught.value.probed) == ("timecode_past_end", "19.75 s")


def test_a_shot_begins_with_the_picture_and_one_that_ends_before_it_is_a_reason() -> None:
    assert clamp_shots([shot(0, 100), shot(20, 50)], 10.0, 15) == [shot(15, 100), shot(20, 50)]
    with pytest.raises(PlanError) as caught:
        clamp_shots([shot(0, 14)], 10.0, 15)
    assert caught.value.reason == "timecode_before_start"
    # half a second is 14.985 frames of the counter, and a picture is there from the 15th on
    assert first_frame(0.5) == first_frame(15 * 1001 / 30000) == 15 and first_frame(0.0) == 0


def test_frames_that_two_shots_claim_belong_to_neither() -> None:
    assert exclusive_ranges([shot(0, 100), shot(100, 200)]) == [(0, 99), (101, 200)]
    assert exclusive_ranges([shot(0, 100), shot(20, 50)]) == [(51, 100), None]
    assert exclusive_ranges([shot(0, 10), shot(0, 10)]) == [None, None]
    draw = random.Random(1)
    for _ in range(300):
        shots = [
            shot(first, first + draw.randint(0, 60))
            for first in draw.choices(range(100), k=draw.randint(1, 6))
        ]
        for number, free in enumerate(exclusive_ranges(shots)):
            claims = [
                sum(each.first <= frame <= each.last for each in shots) for frame in range(170)
            ]
            alone = [
                shots[number].first <= frame <= shots[number].last and claims[frame] == 1
                for frame in range(170)
            ]
            assert (free is None) == (not any(alone))
            assert free is None or all(alone[free[0] : free[1] + 1])
