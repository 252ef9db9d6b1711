"""Windows lie inside one shot, groups on one side of the split, and the shards don't depend on
the order of clips.
"""

import random
import sqlite3
from itertools import pairwise
from math import ceil
from pathlib import Path

import msgspec
import pytest

from bench.label_tree import OBJECTS, SCENE, label_bytes, make_label
from loader.shape import Bucket
from shardgen.catalog.drafts import Draft
from shardgen.labels.parse import Label, Timed, parse_label
from shardgen.rules.shards import (
    PlanError,
    Shot,
    Window,
    assign_shards,
    clamp_shots,
    exclusive_ranges,
    last_frame,
    nearest_aspect,
    programme_group,
    shots_of,
    split_of,
    video_stretches,
    window_order,
    window_starts_ms,
)

FRAME_MS = 1001 / 30
LONG, SHORT = Bucket(1280, 704, 49), Bucket(1280, 704, 17)


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


@pytest.mark.parametrize(
    ("tc_in", "tc_out", "reason"),
    [
        ("00:00:05;00", "00:00:02;00", "timecode_reversed"),
        ("00:01:00;00", "00:01:05;00", "timecode_invalid"),
        ("", "00:00:02;00", "timecode_invalid"),
        ("어제", "오늘", "timecode_invalid"),
    ],
)
def test_a_wrong_timecode_is_a_reason_or_the_whole_clip(
    tc_in: str, tc_out: str, reason: str
) -> None:
    with pytest.raises(PlanError) as caught:
        video_stretches(label((tc_in, tc_out)), 10.0, [LONG], 24.0, 1, whole_clip=False)
    assert caught.value.reason == reason
    (stretch,), flags = video_stretches(
        label((tc_in, tc_out)), 10.0, [LONG], 24.0, 1, whole_clip=True
    )
    assert flags == ["timecodes_wrong"]
    assert stretch.shot == Shot(0, 299, [SCENE] if tc_in else [], [OBJECTS[0]])


def test_missing_timecodes_mean_the_whole_clip_with_a_flag() -> None:
    (stretch,), flags = video_stretches(label(("", "")), 10.01, [LONG], 24.0, 1, whole_clip=False)
    assert flags == ["timecodes_missing"]
    assert (stretch.shot.first, stretch.shot.last, stretch.number) == (0, 299, 0)


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


def test_every_window_lies_inside_its_shot_and_overlaps_no_other() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        first = draw.randint(0, 4000)
        last, count = first + draw.randint(0, 900), draw.randint(1, 5)
        num_frames, fps = draw.choice([1, 5, 17, 49, 81]), draw.choice([24.0, 16.0, 23.976])
        starts = window_starts_ms(first, last, num_frames, fps, count)
        reach_ms = (num_frames - 1) * 1000 / fps
        assert len(starts) <= count
        assert bool(starts) == (ceil(first * FRAME_MS) + reach_ms <= last * FRAME_MS)
        for start in starts:
            assert first * FRAME_MS <= start and start + reach_ms <= last * FRAME_MS
        assert all(
            later - start >= int(num_frames * 1000 / fps) for start, later in pairwise(starts)
        )


def test_a_single_window_stands_in_the_middle_of_its_shot() -> None:
    assert window_starts_ms(0, 299, 49, 24.0, 1) == [int((299 * FRAME_MS - 2000) / 2)]


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


def test_a_shot_takes_the_longest_shape_that_fits_and_a_short_one_none() -> None:
    shots = label(
        ("00:00:00;00", "00:00:03;00"),
        ("00:00:03;01", "00:00:04;10"),
        ("00:00:04;11", "00:00:04;20"),
    )
    stretches, _ = video_stretches(shots, 5.0, [LONG, SHORT], 24.0, 1, whole_clip=False)
    assert [(each.number, each.bucket) for each in stretches] == [(0, LONG), (1, SHORT)]


def test_the_bucket_is_that_of_the_nearest_aspect_ratio() -> None:
    wide, tall, square = Bucket(1280, 704, 49), Bucket(704, 1280, 49), Bucket(960, 960, 49)
    buckets = [tall, SHORT, square, wide]
    assert nearest_aspect(853, 480, buckets) == [wide, SHORT]
    assert nearest_aspect(360, 640, buckets) == [tall]
    assert nearest_aspect(500, 480, buckets) == [square]


def test_groups_are_station_date_and_neighbourhood() -> None:
    def group(clip_id: str) -> str:
        return programme_group("충북", "2019-05-14", clip_id, ("station", "date", "neighbourhood"))

    assert group("2400101") == group("2400199") == "충북/2019-05-14/24001"
    assert group("2400200") == "충북/2019-05-14/24002"
    assert group("news-7") == "충북/2019-05-14/news-7"
    assert programme_group("충북", "2019-05-14", "2400101", ("neighbourhood",)) == "24001"


def test_the_val_share_is_that_of_the_groups() -> None:
    val = sum(split_of(f"충북/2019/{number}", 0, 0.102) == "val" for number in range(50_000))
    assert abs(val / 50_000 - 0.102) < 0.005
    assert {split_of(f"{number}", 0, 0.0) for number in range(100)} == {"train"}
    assert {split_of(f"{number}", 0, 1.0) for number in range(100)} == {"val"}
    grown = {number for number in range(5000) if split_of(f"{number}", 0, 0.2) == "val"}
    assert {number for number in range(5000) if split_of(f"{number}", 0, 0.1) == "val"} < grown


def windows(count: int) -> list[Window]:
    return [
        Window(
            key=f"{random.Random(i).getrandbits(128):032x}",
            label=f"{i}.json",
            clip_id=str(i),
            media_type="video",
            category="",
            programme="",
            split="val" if i % 10 == 0 else "train",
            shot=0,
            start_ms=0,
            fps=24.0,
            prompt="",
            bucket=str(LONG if i % 3 else SHORT),
            media_xxh3="",
        )
        for i in range(count)
    ]


def test_shards_hold_ascending_keys_of_one_bucket_and_split_whatever_the_order_of_clips() -> None:
    made = windows(200)
    plans = list(assign_shards(sorted(made, key=window_order), 32, {}))
    shuffled = random.Random(5).sample(made, len(made))
    assert list(assign_shards(sorted(shuffled, key=window_order), 32, {})) == plans
    assert sorted(each.key for plan in plans for each in plan.windows) == sorted(
        each.key for each in made
    )
    for plan in plans:
        keys = [each.key for each in plan.windows]
        assert keys == sorted(keys) and 1 <= len(keys) <= 32
        assert {(each.split, each.bucket) for each in plan.windows} == {(plan.split, plan.bucket)}
    assert plans[0].name == "train-1280x704x17-000000"


def test_a_draft_gives_windows_back_in_the_order_of_shards_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    made = [
        msgspec.structs.replace(each, media_xxh3=f"{i % 7:032x}", prompt=f'{i}: "가"\n')
        for i, each in enumerate(windows(200))
    ]
    database = sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)
    with Draft(database) as draft:
        draft.add(made[:90])
        draft.add(made[90:])
        assert list(draft.windows()) == sorted(made, key=window_order)
    assert database.execute("SELECT count(*) FROM sqlite_temp_master").fetchone() == (0,)
    database.close()
    assert (tmp_path / "catalog.sqlite").stat().st_size == 0


def test_what_comes_later_goes_to_new_shards() -> None:
    later = assign_shards(sorted(windows(20), key=window_order), 8, {("train", str(LONG)): 7})
    assert [plan.name for plan in later] == [
        "train-1280x704x17-000000",
        "train-1280x704x49-000007",
        "train-1280x704x49-000008",
        "val-1280x704x17-000000",
        "val-1280x704x49-000000",
    ]
