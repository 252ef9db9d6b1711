"""Samples in training: complete, of this LoRA, and the same however many ranks made them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import zstandard

from loader.feed_config import FeedConfig
from train import setup
from train.config import TrainConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.open_sampler import open_sampler
from train.parallel.mesh import World
from train.run import Run
from train.sampling import SamplesConfig, lora_hash, update_norms

ALONE = World(data_rank=0, data_size=1, device=torch.device("cpu"))


@pytest.fixture
def config(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(tiny_dataset)], num_threads=1),
        lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.5),
        samples=SamplesConfig(num_clips=2, num_steps=2),
        num_steps=1,
        global_batch=1,
    )


def built(config: TrainConfig) -> Run:
    with setup.open_feed(config, ALONE) as feed:
        return setup.build(config, ALONE, feed.buckets)


def give_effect(run: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    for _, b in run.adapters.tensors().values():
        b.copy_(torch.randn(b.shape, generator=generator))
    run.adapters.refresh()


def test_an_event_has_a_clip_of_each_prompt_a_sheet_and_what_was_measured(
    config: TrainConfig,
) -> None:
    run = built(config)
    give_effect(run)
    sampler = open_sampler(run)
    assert sampler is not None
    event = sampler.sample(7)
    folder = sampler.folder_of(7)
    names = {path.name for path in folder.iterdir()}
    assert names == {"contact_sheet.png", "samples.json", *(clip.file for clip in event.clips)}
    written = json.loads((folder / "samples.json").read_bytes())
    assert written["step"] == 7 and written["lora_xxh3"] == lora_hash(run.adapters)
    assert {clip.task for clip in event.clips} == {"t2v", "i2v"}
    assert all(clip.mean_difference_levels > 0 for clip in event.clips)
    assert run.model.training  # as it was


def test_adapters_without_effect_show_as_a_difference_of_zero(config: TrainConfig) -> None:
    run = built(config)  # lora_B is zero
    sampler = open_sampler(run)
    assert sampler is not None
    event = sampler.sample(0)
    assert [clip.mean_difference_levels for clip in event.clips] == [0.0, 0.0]
    assert set(event.update_norms.values()) == {0.0}


def test_the_base_is_made_once_and_with_the_adapters_off(config: TrainConfig) -> None:
    run = built(config)
    give_effect(run)
    sampler = open_sampler(run)
    assert sampler is not None
    first = sampler.sample(1)
    base = sorted((Path(config.output) / "samples" / "base").iterdir())
    times = [path.stat().st_mtime_ns for path in base]
    again = sampler.sample(2)
    assert [path.stat().st_mtime_ns for path in base] == times
    assert [c.mean_difference_levels for c in first.clips] == [
        c.mean_difference_levels for c in again.clips
    ]


def test_a_damaged_clip_of_the_base_is_named_and_made_again(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    run = built(config)
    sampler = open_sampler(run)
    assert sampler is not None
    sampler.sample(0)
    kept = sorted((Path(config.output) / "samples" / "base").glob("*.rgb.zst"))
    before = [path.read_bytes() for path in kept]
    kept[0].write_bytes(before[0][:-9])
    kept[1].write_bytes(zstandard.compress(b"of another shape"))
    sampler.sample(1)
    assert [path.read_bytes() for path in kept] == before
    assert all(f"{path} is damaged" in caplog.text for path in kept)


def test_clips_of_another_base_model_are_not_taken_for_its_own(config: TrainConfig) -> None:
    """Of a run that was started with other weights, and ended before its first checkpoint."""
    run = built(config)
    for each in (run, dataclasses.replace(run, base_weights="other")):
        sampler = open_sampler(each)
        assert sampler is not None
        sampler.sample(0)
    base = Path(config.output) / "samples" / "base"
    assert len(list(base.glob("*.rgb.zst"))) == 2 * config.samples.num_clips


def test_what_a_killed_run_has_left_is_no_part_of_an_event(config: TrainConfig) -> None:
    left = Path(config.output) / "samples" / ".step-00000007"
    left.mkdir(parents=True)
    (left / "01-t2v-of-other-keys.mp4").touch()
    sampler = open_sampler(built(config))
    assert sampler is not None
    event = sampler.sample(7)
    names = {path.name for path in sampler.folder_of(7).iterdir()}
    assert names == {"contact_sheet.png", "samples.json", *(clip.file for clip in event.clips)}


def test_switched_off_adapters_come_back(config: TrainConfig) -> None:
    run = built(config)
    give_effect(run)
    module = next(module for block in run.adapters.modules.values() for module in block)
    before = module.b_columns().clone()
    with run.adapters.switched_off():
        assert not module.b_columns().any()
    assert torch.equal(module.b_columns(), before)


def test_the_norm_of_an_update_is_that_of_the_product(config: TrainConfig) -> None:
    run = built(config)
    give_effect(run)
    squares: dict[str, float] = {}
    for name, (a, b) in run.adapters.tensors().items():
        target = name.split(".", 2)[2]
        product = run.adapters.alpha / run.adapters.rank * (b @ a)
        squares[target] = squares.get(target, 0.0) + float(product.square().sum())
    norms = update_norms(run.adapters)
    assert norms.keys() == squares.keys()
    for target, square in squares.items():
        assert norms[target] == pytest.approx(square**0.5, rel=1e-4)


def test_a_file_of_prompts_needs_a_shape(config: TrainConfig, tmp_path: Path) -> None:
    from msgspec.structs import replace

    samples = replace(config.samples, prompts=str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match=r"samples\.shape is empty"):
        open_sampler(built(replace(config, samples=samples)))
    samples = replace(samples, shape="160x96x9")
    with pytest.raises(ValueError, match=r"python -m tools\.prompts"):
        open_sampler(built(replace(config, samples=samples)))
