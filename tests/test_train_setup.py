"""train.setup: what is refused before the first step, and a run that goes on from its checkpoint
in the same process.
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loader.feed_config import FeedConfig
from loader.manifest import DatasetError, encode_manifest, make_manifest, read_manifest
from loader.shape import WAN21, WAN22, Bucket
from tools.fake.batch import write_synthetic_dataset
from train import setup
from train.config import TrainConfig
from train.lora.adapters import LoRAError
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.parallel.mesh import World

CPU, ALONE = torch.device("cpu"), World(data_rank=0, data_size=1, device=torch.device("cpu"))
BUCKET = Bucket(64, 64, 1)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> TrainConfig:
    write_synthetic_dataset(tmp_path / "dataset", {"64x64x1": 6})
    return TrainConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(tmp_path / "dataset")], num_threads=1),
        lora=LoRAConfig(rank=4),
        num_steps=3,
        global_batch=2,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 3, "micro_batch": 2}, "global_batch = 3 is not a multiple"),
        ({"activation_memory": "some"}, 'activation_memory = "some": use'),
        ({"activation_memory": "auto"}, "asks the GPU"),
    ],
)
def test_what_can_not_run_is_refused(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup.build(msgspec.structs.replace(config, **changes), ALONE, [BUCKET])


def test_what_is_no_lora_file_is_refused_before_the_model_is_loaded(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(setup, "load_transformer")
    (tmp_path / "init.safetensors").write_bytes(b"{}")
    changed = msgspec.structs.replace(
        config, lora=LoRAConfig(rank=4, init=str(tmp_path / "init.safetensors"))
    )
    with pytest.raises(LoRAError, match=r"init\.safetensors: can't be read as a LoRA file"):
        setup.build(changed, ALONE, [BUCKET])


def test_deterministic_refuses_attention_that_is_not(config: TrainConfig) -> None:
    model = msgspec.structs.replace(config.model, attention="cudnn")
    changed = msgspec.structs.replace(config, model=model, deterministic=True)
    try:
        with pytest.raises(ValueError, match='with deterministic = true use "gemm", "flash"'):
            setup.build(changed, ALONE, [BUCKET])
    finally:
        torch.use_deterministic_algorithms(False)  # for the whole process


def test_attention_of_many_small_operations_refuses_a_budget(config: TrainConfig) -> None:
    math = msgspec.structs.replace(config.model, attention="math")
    changed = msgspec.structs.replace(config, model=math, activation_memory="1GiB")
    with pytest.raises(ValueError, match='attention = "math" is many small operations'):
        setup.build(changed, ALONE, [BUCKET])


def test_the_plan_gets_what_is_free_less_the_optimizer_and_the_feed(config: TrainConfig) -> None:
    auto = msgspec.structs.replace(config, activation_memory="auto")
    everything = setup.build(auto, ALONE, [BUCKET], free_bytes=lambda device: 2.0**40)
    assert everything.plans[BUCKET].saved is None
    enough = everything.plans[BUCKET].num_bytes + 8 * everything.flat.vector.numel()

    def fits(free_bytes: float, feed_bytes: float = 0.0) -> bool:
        run = setup.build(
            auto, ALONE, [BUCKET], feed_bytes=feed_bytes, free_bytes=lambda device: free_bytes
        )
        return run.plans[BUCKET].saved is None

    assert fits(enough) and not fits(enough - 1)
    assert fits(enough + 100, feed_bytes=100) and not fits(enough + 99, feed_bytes=100)


def test_ranks_that_do_not_divide_the_global_batch_are_refused_before_the_dataset_is_read(
    config: TrainConfig,
) -> None:
    data = msgspec.structs.replace(config.data, datasets=["nowhere"])
    world = World(data_rank=0, data_size=4, device=CPU)
    with pytest.raises(ValueError, match="micro_batch x processes = 1 x 4"):
        setup.open_feed(msgspec.structs.replace(config, data=data), world)


def test_a_checkpoint_brings_back_parameters_optimizer_and_feed(config: TrainConfig) -> None:
    with setup.open_feed(config, ALONE) as feed:
        run = setup.build(config, ALONE, feed.buckets)
        assert run.resume(feed).num_done == 0
        _, feed_state = next(feed)
        run.flat.gradient.normal_()
        run.optimizer.step()
        run.adapters.refresh()
        run.save_checkpoint(1, feed_state, validation=None, best_steps=[])
    with setup.open_feed(config, ALONE) as feed:
        again = setup.build(config, ALONE, feed.buckets)
        assert not torch.equal(again.flat.vector, run.flat.vector)
        assert again.resume(feed).num_done == 1
        assert torch.equal(again.flat.vector, run.flat.vector)
        assert feed.state_dict() == feed_state
        ours, theirs = (r.optimizer.state_dict()["state"][0] for r in (again, run))
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
        # the copies that GEMMs read are renewed too
        for one, other in zip(again.model.buffers(), run.model.buffers(), strict=True):
            assert torch.equal(one, other)


def test_a_dataset_of_another_model_is_refused_and_what_is_not_compared_is_logged(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "dataset"
    setup.open_feed(config, ALONE).close()
    assert "its frame rate was not compared" in caplog.text
    assert "its VAE was not compared with the model's: its recipe names none" in caplog.text
    splits = read_manifest(folder).splits
    for recipe, layout, message in (
        ({"windows": {"fps": 16.0}}, WAN22, "its clips have 16 frames a second"),
        ({"models": {"vae": "0" * 32}}, WAN22, "its latents are of another VAE"),
        ({}, WAN21, "its latents have 16 channels"),
    ):
        manifest = make_manifest(recipe, splits, layout=layout)
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))
        with pytest.raises(DatasetError, match=message):
            setup.open_feed(config, ALONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed: 0 then, 4 now"),
        ({"num_steps": 1}, "num_steps = 1: .* is 2 steps on already; ask for as many or more"),
    ],
)
def test_a_run_that_can_not_go_on_from_its_checkpoint_says_why(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with setup.open_feed(config, ALONE) as feed:
        run = setup.build(config, ALONE, feed.buckets)
        run.flat.gradient.zero_()
        run.optimizer.step()
        run.save_checkpoint(2, next(feed)[1], validation=None, best_steps=[])
        changed = msgspec.structs.replace(config, **changes)
        with pytest.raises(ValueError, match=message):
            setup.build(changed, ALONE, feed.buckets).resume(feed)
