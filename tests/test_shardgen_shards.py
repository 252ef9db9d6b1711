"""Programme groups stand on one side of the split, and the shards don't depend on the order of
clips.
"""

import random

from loader.shape import Bucket
from shardgen.rules.shards import assign_shards, window_order
from shardgen.rules.split import programme_group, split_of
from shardgen.rules.windows import Window

LONG, SHORT = Bucket(1280, 704, 49), Bucket(1280, 704, 17)


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


def test_what_comes_later_goes_to_new_shards() -> None:
    later = assign_shards(sorted(windows(20), key=window_order), 8, {("train", str(LONG)): 7})
    assert [plan.name for plan in later] == [
        "train-1280x704x17-000000",
        "train-1280x704x49-000007",
        "train-1280x704x49-000008",
        "val-1280x704x17-000000",
        "val-1280x704x49-000000",
    ]
