"""What a run decides for each of its shapes: micro-batches by tokens, and attention kernels."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from loader.feed_config import FeedConfig
from loader.shape import WAN22, Bucket
from tools.fake.batch import write_synthetic_dataset
from train import choices, setup
from train.config import TrainConfig
from train.lora.config import LoRAConfig
from train.model import attention
from train.model.attention import AttentionShape, Choice
from train.model.config import ModelConfig
from train.model.wan import TI2V_5B
from train.parallel.mesh import World
from train.run import Run
from train.step import prepare
from train.tally import add_losses

CPU, ALONE = torch.device("cpu"), World(data_rank=0, data_size=1, device=torch.device("cpu"))
SMALL, LARGE = Bucket(64, 64, 1), Bucket(96, 64, 9)  # 4 and 18 tokens


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> TrainConfig:
    write_synthetic_dataset(tmp_path / "dataset", {str(SMALL): 8, str(LARGE): 8})
    return TrainConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(tmp_path / "dataset")], num_threads=1),
        lora=LoRAConfig(rank=4, dropout=0.1),
        num_steps=4,
        global_batch=4,
    )


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return msgspec.structs.replace(config, **changes)


def test_a_micro_batch_has_as_many_samples_as_its_tokens_allow(config: TrainConfig) -> None:
    by_tokens = changed(config, micro_tokens=40)
    for num_ranks, expected in ((1, (4, 2)), (2, (2, 2)), (4, (1, 1))):
        shapes = choices.micro_shapes(by_tokens, num_ranks, [SMALL, LARGE], WAN22)
        assert (shapes[SMALL].batch, shapes[LARGE].batch) == expected
    with pytest.raises(ValueError, match="micro_batch = 2 and micro_tokens = 40: set one"):
        choices.batching(changed(by_tokens, micro_batch=2), 0, 1)


def steps(config: TrainConfig) -> list[tuple[set[int], Tensor, Tensor]]:
    """Per optimizer step: sizes of its micro-batches, loss, gradient."""
    found = []
    with setup.open_feed(config, ALONE) as feed:
        run = setup.build(config, ALONE, feed.buckets)
        for factors in run.adapters.tensors().values():
            factors.b.normal_(generator=torch.Generator().manual_seed(0))
        run.adapters.refresh()
        for _ in range(config.num_steps):
            run.flat.buffer.zero_()
            sizes: list[int] = []
            while sum(sizes) < config.global_batch:
                batch, _ = next(feed)
                sizes.append(len(batch.keys))
                losses_B = run.micro_step.forward(prepare(batch, run.laws))
                add_losses(run.flat, losses_B, batch, config.global_batch)
                run.micro_step.backward()
            found.append((set(sizes), run.flat.loss.clone(), run.flat.gradient.clone()))
    return found


def test_micro_batches_by_tokens_give_the_losses_and_gradients_of_single_samples(
    config: TrainConfig,
) -> None:
    single, by_tokens = steps(config), steps(changed(config, micro_tokens=40))
    assert [sizes for sizes, _, _ in single] == [{1}] * 4
    assert {size for sizes, _, _ in by_tokens for size in sizes} == {2, 4}
    for (_, loss, gradient), (_, other_loss, other_gradient) in zip(single, by_tokens, strict=True):
        assert (other_loss / loss - 1).abs() < 1e-5
        assert (other_gradient - gradient).norm() < 1e-5 * gradient.norm()


def test_both_attentions_of_every_shape_are_chosen_for(config: TrainConfig) -> None:
    shapes = choices.micro_shapes(changed(config, micro_tokens=40), 1, [SMALL, LARGE], WAN22)
    assert choices.attention_shapes(TI2V_5B, shapes.values()) == [
        AttentionShape(4, 24, 4, 4, 128),
        AttentionShape(4, 24, 4, 512, 128),
        AttentionShape(2, 24, 18, 18, 128),
        AttentionShape(2, 24, 18, 512, 128),
    ]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU with two kernels, of which the slower one looks faster; notes what is timed."""
    calls: list[str] = []

    def time_ms(name: str, shape: AttentionShape, *_: object) -> float:
        calls.append(name)
        return {"flash": 2.0, "gemm": 1.0 if shape.num_keys == 18 else 3.0}[name]

    monkeypatch.setattr(attention, "candidates", lambda *_: ["flash", "gemm"])
    monkeypatch.setattr(attention, "time_ms", time_ms)
    return calls


def kernels(run: Run) -> list[str]:
    return [run.kernels.kernel_for(keys, keys) for keys in (4, 18)]


def test_the_kernels_that_were_timed_are_kept_on_resume_on_the_same_card(
    config: TrainConfig,
    timed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with setup.open_feed(config, ALONE) as feed:
        run = setup.build(config, ALONE, feed.buckets)
        assert kernels(run) == ["flash", "gemm"] and len(timed) == 2 * 4
        assert any("18 keys: gemm of flash 2.00 ms, gemm 1.00 ms" in x for x in run.describe())
        _, feed_state = next(feed)
        run.save_checkpoint(1, feed_state, validation=None, best_steps=[])

        again = setup.build(config, ALONE, feed.buckets)
        assert again.kernels == run.kernels and len(timed) == 2 * 4
        assert "timed again" not in caplog.text

        monkeypatch.setattr(attention, "card_name", lambda _: "another card")
        other = setup.build(config, ALONE, feed.buckets)
        assert len(timed) == 4 * 4 and other.kernels.card == "another card"
    assert "were chosen on cpu" in caplog.text and "timed again" in caplog.text


def test_deterministic_takes_the_fixed_table_and_times_nothing(
    config: TrainConfig, timed: list[str]
) -> None:
    shapes = [AttentionShape(1, 24, 18, 18, 128), AttentionShape(1, 24, 18, 512, 128)]
    found = choices.attention_kernels(changed(config, deterministic=True), ALONE, shapes)
    assert not timed and {row.kernel for row in found.rows} == {"flash"}


def test_what_a_deterministic_run_took_untimed_is_timed_once_it_need_not_be_deterministic(
    config: TrainConfig, timed: list[str]
) -> None:
    with setup.open_feed(config, ALONE) as feed:
        try:
            run = setup.build(changed(config, deterministic=True), ALONE, feed.buckets)
        finally:
            torch.use_deterministic_algorithms(False)  # for the whole process
        assert kernels(run) == ["flash", "flash"] and not timed
        _, feed_state = next(feed)
        run.save_checkpoint(1, feed_state, validation=None, best_steps=[])
        again = setup.build(config, ALONE, feed.buckets)
    assert kernels(again) == ["flash", "gemm"] and len(timed) == 2 * 4


def test_what_the_main_process_can_not_choose_is_an_error_of_every_process(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes get the main one's error instead of waiting for its choice."""
    sent: list[Choice | ValueError] = []

    def broadcast(value: Any, world: World) -> Any:
        sent.append(value)
        return sent[0]

    monkeypatch.setattr("train.parallel.mesh.broadcast", broadcast)
    wrong = changed(config, model=msgspec.structs.replace(config.model, attention="cudnn"))
    for rank in (0, 1):
        with pytest.raises(ValueError, match="cudnn"):
            choices.attention_kernels(wrong, World(rank, 2, CPU), [])
    assert isinstance(sent[0], ValueError) and sent[1] is None
