"""base.py: what the base model decides of a run's configuration, and what it can't be asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loader.feed_config import FeedConfig
from loader.manifest import DatasetError
from loader.models import FIRST_FRAME_AND_GREY, I2V_A14B, T2V_A14B, TI2V_5B, WAN21_T2V
from loader.shape import WAN21, Bucket
from tools.fake.batch import write_synthetic_dataset
from train import setup
from train.base import base_kind, laws_of, resolve
from train.config import TrainConfig, flat
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.parallel.mesh import World
from train.sampling import SamplesConfig
from train.step import prepare

TinyModel = Callable[[str], Path]
ALONE = World(data_rank=0, data_size=1, device=torch.device("cpu"))
BUCKET = Bucket(64, 48, 9)


def config_of(model: Path | str = "", dataset: Path | str = "", **changes: Any) -> TrainConfig:
    """changes: of the tables model and data, by dotted key."""
    raw: dict[str, Any] = {
        "output": "run",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"datasets": [str(dataset)], "num_threads": 1},
        "lora": {"rank": 2},
        "num_steps": 1,
        "global_batch": 2,
    }
    for key, value in changes.items():
        table, name = key.split("__")
        raw.setdefault(table, {})[name] = value
    return msgspec.convert(raw, TrainConfig)


def test_unset_keys_are_the_models_own_and_equal_what_older_runs_had() -> None:
    values = flat(resolve(config_of(), TI2V_5B))
    assert (values["flow.shift"], values["samples.guidance"]) == (5.0, 5.0)
    high, low = (config_of(model__expert=expert) for expert in ("high", "low"))
    assert resolve(high, T2V_A14B).flow.shift == 12.0
    assert resolve(high, T2V_A14B).samples.guidance == 4.0
    assert resolve(low, T2V_A14B).samples.guidance == 3.0
    assert resolve(high, I2V_A14B).flow.shift == 5.0
    assert resolve(config_of(flow__shift=3.0), T2V_A14B).flow.shift == 3.0


def test_the_noise_levels_are_the_experts_own_and_a_whole_model_has_all() -> None:
    laws = laws_of(config_of(model__expert="low"), T2V_A14B)
    assert (laws.expert, laws.boundary, laws.of(BUCKET).shift) == ("low", 0.875, 12.0)
    assert laws_of(config_of(), WAN21_T2V).expert is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t2v-a14b", {"data__i2v_share": 0.0}, "model.expert is not set"),
        ("t2v-a14b", {"model__expert": "high"}, "i2v_share = 0.4: Wan2.2-T2V-A14B does text"),
        ("i2v-a14b", {"model__expert": "low"}, "i2v_share = 0.4: Wan2.2-I2V-A14B does image"),
        (
            "i2v-a14b",
            {"model__expert": "low", "data__i2v_share": 1.0, "data__condition": "raw"},
            'data.condition = "raw": for Wan2.2-I2V-A14B it would encode each clip',
        ),
        ("wan2.1-t2v", {"model__expert": "high", "data__i2v_share": 0.0}, "is one transformer"),
    ],
)
def test_what_a_model_does_not_do_is_refused_by_name(
    tiny_model: TinyModel, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        base_kind(config_of(tiny_model(kind), **changes))


def test_a_dataset_without_a_condition_is_refused_for_image_to_video_alone(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    plain, given = tmp_path / "plain", tmp_path / "given"
    write_synthetic_dataset(plain, {str(BUCKET): 2}, layout=WAN21)
    write_synthetic_dataset(given, {str(BUCKET): 2}, layout=WAN21, condition=FIRST_FRAME_AND_GREY)
    i2v = {"model__expert": "high", "data__i2v_share": 1.0}
    with pytest.raises(DatasetError, match=r"hold no condition, and Wan2.2-I2V-A14B learns"):
        setup.open_feed(config_of(tiny_model("i2v-a14b"), plain, **i2v), ALONE)
    with setup.open_feed(config_of(tiny_model("i2v-a14b"), given, **i2v), ALONE) as feed:
        batch, _ = next(feed)
        assert batch.given_BCTHW is not None and batch.is_i2v == [True]
        # what was stored, in the place where the model takes it
        inputs = prepare(batch, laws_of(config_of(model__expert="high"), I2V_A14B))
        assert torch.equal(inputs.latent_BCThw[:, 20:], batch.given_BCTHW.float())
        assert inputs.num_clean_frames_B.tolist() == [0]
    t2v = {"model__expert": "high", "data__i2v_share": 0.0}
    for dataset in (plain, given):
        with setup.open_feed(config_of(tiny_model("t2v-a14b"), dataset, **t2v), ALONE) as feed:
            assert next(feed)[0].given_BCTHW is None


def test_samples_that_start_from_a_clip_have_its_shape(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    write_synthetic_dataset(tmp_path, {str(BUCKET): 2}, layout=WAN21)
    for key, value in (("shape", "64x64x9"), ("prompts", "some.file")):
        config = msgspec.structs.replace(
            config_of(),
            model=ModelConfig(path=str(tiny_model("t2v-a14b")), expert="low", dtype="float32"),
            data=FeedConfig(datasets=[str(tmp_path)], i2v_share=0.0),
            lora=LoRAConfig(rank=2),
            samples=msgspec.convert({key: value}, SamplesConfig),
        )
        with pytest.raises(ValueError, match=f"samples.{key} = .*: the low-noise expert starts"):
            setup.build(config, ALONE, [BUCKET])
