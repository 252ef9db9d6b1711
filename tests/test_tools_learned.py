"""What the learned model has seen, and the corpus that teaches it more: nothing leaks."""

import json
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from bench.learn.controls import CONTROLS
from bench.learn.dit import FlowMatching, small_transformer
from bench.learn.training import Clock, GraphedTraining
from bench.learn.vae import small_vae
from bench.learn.verdicts import say, verdicts
from loader.config import load_toml
from shardgen.config import ShardgenConfig
from shardgen.labels.parse import parse_label
from shardgen.rules.prompt import clip_prompt
from shardgen.rules.split import split_of
from tools.evaluate.config import EvaluateConfig, check
from tools.evaluate.extractors import file_sha256
from tools.evaluate.result import (
    Comparison,
    Metric,
    Result,
    Variant,
    read_result,
    write_result,
)
from tools.fake import learned_corpus
from tools.fake.learned_clips import (
    BUCKET,
    FOLDER,
    HELD_OUT,
    MOVES,
    NUM_EXCLUDED,
    NUM_JITTERED,
    SENTENCES,
    all_windows,
    captions,
    picture_windows,
)
from tools.fake.learned_corpus import CATEGORIES
from train.config import TrainConfig
from train.flow import noise_latent, sample_losses
from train.step import Inputs

ROOT = Path(__file__).resolve().parent.parent
FILM = np.arange(132, dtype=np.uint8)[:, None, None, None] * np.ones((1, 96, 160, 3), np.uint8)


def test_there_are_twenty_captions_and_some_windows_of_each_are_excluded() -> None:
    windows = all_windows(FILM)
    assert len(captions()) == len(set(captions())) >= 20
    for caption, subject in captions().items():
        own = [window for window in windows if window.caption == caption]
        assert {window.subject for window in own} == {subject}
        assert {window.excluded for window in own} == {False, True}
    assert all(window.frames.shape == (9, 96, 160, 3) for window in windows)


def test_no_frame_of_an_excluded_film_window_is_trained_on() -> None:
    film = [window for window in all_windows(FILM) if window.subject == "bunny"]
    frames = {
        excluded: {int(f[0, 0, 0]) for w in film if w.excluded == excluded for f in w.frames}
        for excluded in (False, True)
    }
    assert frames[True] and frames[False] and not frames[True] & frames[False]


def test_a_window_is_the_same_at_every_size() -> None:
    large = list(picture_windows("cat", (320, 192), 9))
    small = list(picture_windows("cat", (160, 96), 9))
    assert len(large) == len(MOVES) * NUM_JITTERED
    assert sum(window.excluded for window in large) == len(MOVES) * NUM_EXCLUDED
    halved = large[3].frames.reshape(9, 96, 2, 160, 2, 3).mean((2, 4))
    assert np.abs(halved - small[3].frames).mean() < 3


def test_labels_give_the_captions_and_splits_share_no_clip() -> None:
    made = [
        learned_corpus.Clip(subject, f"{sentence} 움직인다.", "val", FILM[:2])
        for subject, sentence in SENTENCES.items()
    ]
    for clip in made:
        data = json.dumps(learned_corpus.label_of(clip, "3100001"), ensure_ascii=False).encode()
        config = load_toml(ROOT / "configs/shardgen/learned.toml", ShardgenConfig)
        assert clip_prompt(parse_label(data), "video", config.prompt) == clip.caption
    by_split: dict[str, list[bytes]] = {"train": [], "val": []}
    subjects: Counter[str] = Counter()
    for clip in learned_corpus.clips():
        by_split[clip.split].append(clip.frames.tobytes())
        subjects[f"{clip.split} {clip.subject}"] += 1
    assert not set(by_split["train"]) & set(by_split["val"])
    assert set(subjects) == {f"{split} {each}" for split in by_split for each in SENTENCES}
    assert subjects[f"train {HELD_OUT}"] == 60 and subjects[f"val {HELD_OUT}"] == 65


def test_numbers_lie_on_their_side_of_the_recipes_split() -> None:
    config = load_toml(ROOT / "configs/shardgen/learned.toml", ShardgenConfig)
    for split in ("train", "val"):
        numbers = learned_corpus.numbers_of(split)
        for _ in range(20):
            group = str(next(numbers))
            assert split_of(group, config.split.seed, config.split.val_share) == split


def test_the_configurations_of_the_demo_fit_together() -> None:
    trained = load_toml(ROOT / "configs/train/learned.toml", TrainConfig)
    evaluated = load_toml(ROOT / "configs/evaluate/learned.toml", EvaluateConfig)
    check(evaluated)
    assert evaluated.datasets == trained.data.datasets
    assert evaluated.sampling.shift == trained.flow.shift
    assert Path(trained.model.path) == FOLDER.relative_to(ROOT)


def test_both_networks_fit_into_twelve_mib_and_have_the_real_head_size() -> None:
    with torch.device("meta"):
        transformer = small_transformer(32, torch.device("meta"))
        vae = small_vae(torch.device("meta"))
    num = sum(p.numel() for network in (transformer, vae) for p in network.parameters())
    assert 2 * num < 12 * 2**20
    assert transformer.config.attention_head_dim == 128


def test_the_weights_are_those_that_the_card_describes() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("vae", "transformer"):
        weights = FOLDER / part / "diffusion_pytorch_model.safetensors"
        assert file_sha256(weights) in card


def test_the_loss_is_the_trainers() -> None:
    class Zero(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
            self.x, self.t = hidden_states, _["timestep"]
            return (torch.zeros_like(hidden_states),)

    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 48, 3, 6, 10, generator=generator) for _ in range(2))
    sigmas, is_i2v = [0.3, 0.8], [True, False]
    network = Zero()
    loss = FlowMatching(network)(
        x0, noise, torch.tensor(sigmas), torch.zeros(2, 512, 32), torch.tensor([1.0, 0.0])
    )
    noised = noise_latent(x0, noise, sigmas, is_i2v)
    losses = sample_losses(torch.zeros_like(x0), noised.target_BCThw, noised.num_clean_frames_B)
    assert torch.allclose(loss, losses.mean())
    assert torch.allclose(network.x, noised.latent_BCThw, atol=1e-6)
    tokens = 3 * (BUCKET.height_px // 32) * (BUCKET.width_px // 32)
    assert network.t.shape == (2, tokens)  # type: ignore[attr-defined]
    assert network.t[0, : tokens // 3].eq(0).all()  # type: ignore[index]
    assert network.t[0, tokens // 3 :].eq(300).all()  # type: ignore[index]


def test_training_lowers_the_loss_and_ends_when_it_should() -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(4, 1)
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    trainer = GraphedTraining(
        network,
        lambda x, y: (network(x) - y).square().mean(),
        (x, y),
        weight_decay=0.0,
        graphed=False,
    )
    clock, losses = Clock(0.0, 50), []
    while clock.next():
        losses.append(float(trainer.step((x, y), clock.lr(0.05, 5))))
    assert clock.num_steps == len(losses) == 50 and losses[-1] < 0.8 * losses[0]
    assert clock.lr(1.0, 5) == pytest.approx(0.01, abs=1e-6)


def test_the_controls_are_wrong_in_one_way_each() -> None:
    x, text = torch.randn(3, 2), torch.arange(3.0)
    inputs = Inputs(x, x, x, text_BSD=text, target_BCThw=x, seeds_B=x, weight_B=x)
    shuffled, sign = (control(inputs) for control in CONTROLS.values())
    assert shuffled.text_BSD.tolist() == [2, 0, 1]
    assert torch.equal(sign.target_BCThw, -x)
    assert shuffled._replace(text_BSD=text) == inputs
    assert sign._replace(target_BCThw=x) == inputs


def test_a_bar_that_is_missed_is_told_and_one_without_enough_clips_is_not_held() -> None:
    def result(taught: float, num_clips: int, verdict: str) -> Result:
        category = CATEGORIES[HELD_OUT]
        return Result(
            variants=[Variant(name) for name in ("real", "base", "lora", "sign")],
            metrics=[
                Metric("latent_frechet", "base", category, 1000.0, n=num_clips),
                Metric("latent_frechet", "lora", category, taught, n=num_clips),
                Metric("latent_retrieval", "lora", category, 0.95, n=num_clips),
            ],
            comparisons=[
                Comparison("latent_frechet", "lora", verdict="better"),
                Comparison("latent_frechet", "sign", verdict=verdict),
            ],
        )

    said = [
        [each.holds for each in verdicts(result(*case))]
        for case in ((250.0, 65, "worse"), (251.0, 65, "undecided"), (100.0, 63, "worse"))
    ]
    assert said == [[True] * 4, [False, True, True, False], [None, None, True, True]]
    few = [each.why for each in verdicts(result(251.0, 63, "worse"))]
    assert few[0] == "fewer than 64 clips; the figure by itself does not meet the bar"
    assert few[1] == "fewer than 64 clips; the figure by itself meets the bar"


@pytest.mark.parametrize(("distance", "holds"), [(1990.0, True), (2010.0, False)])
def test_of_what_the_base_knows_a_lora_may_not_lose_much_and_need_not_be_better(
    distance: float, holds: bool
) -> None:
    category = CATEGORIES["rocket"]
    known = Result(
        variants=[Variant(name) for name in ("real", "base", "lora")],
        metrics=[
            Metric("latent_frechet", "base", category, 1000.0, n=65),
            Metric("latent_frechet", "lora", category, distance, n=65),
        ],
        comparisons=[Comparison("latent_frechet", "lora", verdict="worse")],
    )
    assert [each.holds for each in verdicts(known)] == [holds]


def test_what_too_few_clips_leave_open_is_neither_held_nor_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    category = CATEGORIES[HELD_OUT]
    few = Result(
        variants=[Variant(name) for name in ("real", "base", "lora", "sign")],
        metrics=[
            Metric("latent_frechet", "base", category, 1000.0, n=65),
            Metric("latent_frechet", "lora", category, 100.0, n=65),
        ],
        comparisons=[
            # ten real clips
            Comparison("latent_frechet", "lora", category=category, verdict="too_few"),
            Comparison("latent_frechet", "lora", verdict="too_few"),
            Comparison("latent_retrieval", "lora", verdict="better"),
            Comparison("latent_frechet", "sign", verdict="too_few"),
        ],
    )
    write_result(tmp_path, few)
    # nothing is missed, but nothing shown either
    assert not say(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines[:3]] == ["not judged"] * 3
    assert "fewer than 64 real clips; the figure by itself meets the bar" in lines[0]
    assert "too few clips or prompts for latent_frechet" in lines[1]
    assert lines[3] == "0 hold, 0 missed, 3 not judged"
    undecided = [Comparison("latent_frechet", "lora", verdict="undecided"), *few.comparisons[2:]]
    write_result(tmp_path, msgspec.structs.replace(few, comparisons=undecided))
    assert [each.holds for each in verdicts(read_result(tmp_path))] == [True, False, None]
