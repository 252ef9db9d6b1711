"""walk.py: a split walked once, sample by sample, in key order, nothing left out."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from loader.exclusions import Exclusion, write_exclusions
from loader.feed_config import FeedConfig
from loader.manifest import DatasetError
from loader.read import TooManyDamagedError
from loader.walk import Walk
from tools.fake.batch import write_synthetic_dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_synthetic_dataset(
        folder, {"64x32x5": 11, "64x32x1": 3}, samples_per_shard=4, text_dim=8, split="val"
    )
    return folder


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "dataset"))


def walk(*datasets: Path, exclude: list[str] | None = None) -> Walk:
    names = [str(dataset) for dataset in datasets]
    return Walk(FeedConfig(datasets=names, exclude=exclude or []), "val", "cpu")


def test_every_sample_is_there_once_in_key_order_and_read_alone(source: Path) -> None:
    with walk(source) as places_of:
        places = places_of.places
        keys = [place.key for place in places]
        assert len(set(keys)) == 14 and keys == sorted(keys)
        for i, place in enumerate(places):
            batch = places_of.batch(place, is_i2v=i % 2 == 0, seed=i)
            assert (batch.keys, batch.is_i2v, batch.seeds) == ([place.key], [i % 2 == 0], [i])
            assert batch.caption_dropped == [False] and batch.bucket == place.bucket
            rng = np.random.default_rng(int(place.key, 16))  # as tools/fake/batch.py draws
            latent = rng.standard_normal(batch.latent_BCTHW.shape[1:], np.float32)
            assert (batch.latent_BCTHW[0].numpy() == latent.astype(np.float16)).all()
            assert places_of.meta(place).key == place.key


def test_two_datasets_are_walked_as_one(source: Path, tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, {"64x32x5": 5}, text_dim=8, split="val", seed=1)
    with walk(source, tmp_path) as both:
        assert len(both.places) == 19
        assert [place.key for place in both.places] == sorted(place.key for place in both.places)
        for place in both.places:
            assert both.batch(place, is_i2v=False, seed=0).dataset == place.dataset


def test_excluded_samples_are_not_walked(source: Path, tmp_path: Path) -> None:
    with walk(source) as whole:
        chosen = whole.places[3].key
    path = tmp_path / "exclusions.csv"
    write_exclusions(path, [Exclusion(f"synthetic/{chosen}.json", "exclude")])
    with walk(source, exclude=[str(path)]) as rest:
        assert len(rest.places) == 13 and chosen not in {place.key for place in rest.places}


def test_a_damaged_sample_is_refused_by_name_not_replaced(dataset: Path) -> None:
    tar = min((dataset / "val").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[520] ^= 1
    tar.write_bytes(data)
    key = tar.with_suffix(".idx").read_text().splitlines()[1].split()[3][:32]
    with walk(dataset) as damaged:
        (place,) = [place for place in damaged.places if place.key == key]
        for _ in range(2):
            with pytest.raises(TooManyDamagedError, match=f"{key}.*or leave .* by data.exclude"):
                damaged.batch(place, is_i2v=False, seed=0)


def test_a_damaged_index_and_an_empty_split_are_named(dataset: Path) -> None:
    path = min((dataset / "val").glob("*.idx"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=f"{path.stem}.*its hash differs.*verify"):
        walk(dataset)
