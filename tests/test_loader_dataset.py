"""dataset.py: missing files are no damage, and what people have excluded takes no part."""

import logging
import re
import shutil
from pathlib import Path

import pytest

from loader.batch import Batch
from loader.exclusions import Exclusion, write_exclusions
from loader.feed import Feed
from loader.manifest import DatasetError
from loader.order import OrderError
from tools.fake.batch import write_synthetic_dataset
from tools.fake.feed import make_feed

G = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(folder, {"64x32x5": 128, "64x32x1": 8}, samples_per_shard=8, text_dim=8)
    return folder


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "dataset"))


def take(feed: Feed, num: int) -> list[Batch]:
    return [next(feed)[0] for _ in range(num)]


@pytest.mark.parametrize("suffix", ["tar", "idx", "xxh3"])
def test_a_dataset_that_lacks_most_of_its_files_is_refused_with_the_numbers(
    dataset: Path, suffix: str
) -> None:
    for path in sorted((dataset / "train").glob(f"train-64x32x5-*.{suffix}")):
        path.unlink()
    with pytest.raises(
        DatasetError,
        match=re.escape(
            f"{dataset}: 16 of 17 shards of train lack files, which is 128 of 136 samples; the "
            f"first is train/train-64x32x5-000000.{suffix}"
        ),
    ):
        make_feed(dataset, global_batch=G)


@pytest.mark.parametrize("is_folder", [False, True])
def test_one_missing_file_is_refused_whatever_max_damaged_allows(
    dataset: Path, is_folder: bool
) -> None:
    path = dataset / "train" / "train-64x32x1-000000.idx"
    path.unlink()
    if is_folder:
        path.mkdir()
    with pytest.raises(DatasetError, match="1 of 17 shards of train lack files, which is 8 of"):
        make_feed(dataset, global_batch=G, max_damaged=1000)


def test_a_shard_that_vanishes_later_counts_with_all_samples_and_the_end_repeats_it(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_feed(dataset, global_batch=G, micro_batch=G) as feed:
        (dataset / "train" / "train-64x32x5-000003.tar").unlink()
        take(feed, feed.num_batches_per_epoch)
        assert feed.num_damaged == 8
    assert caplog.messages[-1].startswith(f"{dataset}: rank 0 could not use 8 samples")


def exclude(path: Path, labels: list[str]) -> str:
    write_exclusions(path, [Exclusion(label, "exclude") for label in labels])
    return str(path)


def test_excluded_labels_are_trained_on_no_more_and_counted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_feed(source, global_batch=G, micro_batch=G) as feed:
        keys = sorted({key for batch in take(feed, 17) for key in batch.keys})
    chosen = keys[::9]
    labels = [f"synthetic/{key}.json" for key in chosen]
    path = exclude(tmp_path / "exclusions.csv", [*labels, "video/unknown.json"])
    with (
        caplog.at_level(logging.INFO, "loader.dataset"),
        make_feed(source, global_batch=G, micro_batch=G, exclude=[path]) as feed,
    ):
        seen = {key for batch in take(feed, 60) for key in batch.keys}
    num = len(chosen)
    assert f"{num} samples of train are excluded, by {num} of the {num + 1} labels" in caplog.text
    # the images are fewer than a global batch now
    images = {key for batch in take_images(source) for key in batch.keys}
    assert seen == set(keys) - set(chosen) - images


def take_images(source: Path) -> list[Batch]:
    with make_feed(source, global_batch=G, micro_batch=G) as feed:
        return [batch for batch in take(feed, 17) if batch.bucket.num_frames == 1]


def test_an_excluded_sample_never_stands_in_for_a_damaged_one(
    dataset: Path, tmp_path: Path
) -> None:
    tar = dataset / "train" / "train-64x32x5-000000.tar"
    index = tar.with_suffix(".idx").read_text().splitlines()[1:]
    first_offset, second_key = int(index[0].split()[1]), index[1].split()[3][:32]
    path = exclude(tmp_path / "exclusions.csv", [f"synthetic/{second_key}.json"])
    data = bytearray(tar.read_bytes())
    data[first_offset] ^= 1
    tar.write_bytes(data)
    with make_feed(dataset, global_batch=G, micro_batch=G, exclude=[path]) as feed:
        seen = {key for batch in take(feed, 40) for key in batch.keys}
        assert feed.num_damaged == 1
    assert second_key not in seen


def test_a_changed_list_is_another_sequence(source: Path, tmp_path: Path) -> None:
    with make_feed(source, global_batch=G) as feed:
        state, keys = feed.state_dict(), [key for batch in take(feed, 8) for key in batch.keys]
    path = exclude(tmp_path / "exclusions.csv", [f"synthetic/{keys[0]}.json"])
    with (
        make_feed(source, global_batch=G, exclude=[path]) as feed,
        pytest.raises(OrderError, match="num_excluded"),
    ):
        feed.load_state_dict(state)
    nobody = exclude(tmp_path / "none.csv", ["video/unknown.json"])
    with make_feed(source, global_batch=G, exclude=[nobody]) as feed:
        feed.load_state_dict(state)  # a list that excludes nothing here is none


def test_there_is_a_list_for_each_dataset_or_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="names 2 files for 1 datasets"):
        make_feed(source, global_batch=G, exclude=["a.csv", "b.csv"])
    with pytest.raises(DatasetError, match="can't read the exclusions"):
        make_feed(source, global_batch=G, exclude=[str(tmp_path / "a.csv")])
    make_feed(source, source, global_batch=G, exclude=["", ""]).close()


def test_a_bucket_smaller_than_the_global_batch_is_called_never_trained(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "loader.feed"),
        make_feed(source, global_batch=16) as feed,
    ):
        assert [str(bucket) for bucket in feed.buckets] == ["64x32x5"]
    assert "others each time: none; never trained" in caplog.text
    assert "fewer samples than a global batch of 16: 8 of 64x32x1" in caplog.text
