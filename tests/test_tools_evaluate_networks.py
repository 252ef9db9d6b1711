"""The networks that scores come from: what is refused, what is fed in, and that they react. No hub:
a TorchScript module made here, towers of tiny configurations with random weights.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from tools.evaluate import towers
from tools.evaluate.clips import Frames
from tools.evaluate.config import ClipConfig, FVDConfig
from tools.evaluate.extractors import Extractor, damaged, file_sha256, self_test
from tools.evaluate.pictures import measure, psnr_db
from tools.evaluate.towers import Tower
from tools.fake.checkpoint import write_tokenizer
from tools.fake.learned_clips import MOVES, SENTENCES, moved_over, picture

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """I3D's signature: pictures' means on a coarse grid, and how they change."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale and not resize and return_features
        pooled = torch.nn.functional.adaptive_avg_pool3d(x, (2, 3, 3)).flatten(1)
        edges = (x[:, :, :, :, 1:] - x[:, :, :, :, :-1]).abs().mean(dim=[2, 3, 4])
        return torch.cat([pooled, 4 * edges], 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("extractor") / "tiny.pt"
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript, which is what I3D's file is
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Tiny()), str(path))
    return path


@pytest.fixture(scope="module")
def real_clips() -> list[Frames]:
    """40 clips of photographs that a camera moves over."""
    clips = []
    for subject in ("cat", "rocket", "cameraman", "astronaut"):
        for move in MOVES.values():
            for start, end in ((move.start, move.end), (move.end, move.start)):
                clips.append(moved_over(picture(subject), start, end, (64, 48), 16))
    return clips


def extractor(weights: Path, **changes: object) -> Extractor:
    config = FVDConfig(
        weights=str(weights), sha256=file_sha256(weights), name="fd_tiny", size_px=32
    )
    return Extractor(FVDConfig(**{**_fields(config), **changes}), CPU)  # type: ignore[arg-type]


def _fields(config: FVDConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_an_extractor_of_another_hash_is_not_loaded(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SHA-256 is"):
        extractor(weights, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"get i3d_torchscript\.pt.*nothing is downloaded"):
        Extractor(FVDConfig(weights=str(tmp_path / "missing.pt")), CPU)


def test_nine_frames_are_too_few_for_sixteen(weights: Path) -> None:
    assert extractor(weights).why_not(9) == "9 frames a clip, the extractor takes 16"
    assert extractor(weights).why_not(16) == ""
    assert extractor(weights, name="fvd", num_frames=4).why_not(9) != ""


def test_features_follow_the_contract(weights: Path, real_clips: list[Frames]) -> None:
    frames = real_clips[0]
    found = extractor(weights).features(frames)
    scaled = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1
    resized = torch.nn.functional.interpolate(
        scaled.transpose(0, 1), (32, 32), mode="bilinear", align_corners=False
    ).transpose(0, 1)
    expected = Tiny()(resized[None], False, False, True)[0]
    assert found.dtype == np.float32 and np.allclose(found, expected.numpy(), atol=1e-6)


def test_an_extractor_that_reacts_passes_and_one_that_does_not_is_told(
    weights: Path, real_clips: list[Frames]
) -> None:
    ours = extractor(weights)
    features = np.stack([ours.features(clip) for clip in real_clips])
    # both halves hold all subjects
    order = np.random.default_rng(0).permutation(len(features))
    spoilt = [
        np.stack([ours.features(damaged(clip, how, i)) for i, clip in enumerate(real_clips)])
        for how in ("blurred", "noise")
    ]
    assert self_test(features[order], spoilt[0][order], spoilt[1][order]) == ""
    constant = np.random.default_rng(0).standard_normal(features.shape)
    assert "does not react" in self_test(constant, constant, constant)
    assert "too few" in self_test(features[:6], spoilt[0][:6], spoilt[1][:6])


@pytest.fixture(scope="module", params=["sigmoid", "softmax"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tower:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = write_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "sigmoid":
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        CLIPModel(config).save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
    return Tower(ClipConfig(model=str(folder), kind=request.param), CPU)


def test_every_text_is_sixty_four_ids_and_longer_ones_are_counted(tower: Tower) -> None:
    long = " ".join(SENTENCES.values())
    assert tower.ids(["토끼", long]).shape == (2, 64)
    assert tower.num_truncated(["토끼", long]) == 1


def test_a_tower_gives_unit_vectors_of_texts_and_of_eight_frames(tower: Tower) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (17, 48, 64, 3), dtype=np.uint8)
    pictures_ND, texts_ND = tower.frames(frames), tower.texts(["토끼가 간다.", "고양이가 본다."])
    assert pictures_ND.shape[0] == 8 and texts_ND.shape == (2, pictures_ND.shape[1])
    assert np.allclose(np.linalg.norm(pictures_ND, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(texts_ND, axis=1), 1, atol=1e-5)
    assert not np.allclose(texts_ND[0], texts_ND[1], atol=1e-4)


def test_shuffled_texts_lower_the_score(tower: Tower) -> None:
    captions = list(SENTENCES.values())
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8) for _ in range(80)]
    texts = [tower.texts([caption]) for caption in captions]
    table = towers.cosine_table([tower.frames(picture) for picture in pictures], texts)
    # random weights know no captions: of each caption we take the picture that fits it best,
    # measured by what it has beyond the picture's and the caption's own mean
    fit = table - table.mean(0) - table.mean(1, keepdims=True)
    own = table[fit.argmax(0)]
    shuffled = own[np.roll(np.arange(len(captions)), 1)]
    assert np.diag(own).mean() > np.diag(shuffled).mean()


def test_a_tower_of_the_other_loss_or_without_files_is_refused(
    tower: Tower, tmp_path: Path
) -> None:
    other = "softmax" if "(sigmoid)" in tower.name else "sigmoid"
    folder = tower._config.model
    with pytest.raises(ValueError, match="trained with a"):
        Tower(ClipConfig(model=folder, kind=other), CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing is downloaded"):
        Tower(ClipConfig(model=str(tmp_path)), CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        Tower(ClipConfig(model=str(tmp_path)), CPU)


def test_an_encoder_that_does_not_read_korean_is_told(tower: Tower) -> None:
    random = np.random.default_rng(0)
    captions = list(SENTENCES.values()) * 4
    blind = 0.2 + 0.02 * random.standard_normal((24, 24))
    assert "does not read Korean" in towers.why_blind(blind, captions)
    assert towers.why_blind(blind + 0.1 * np.eye(24), captions) == ""
    assert "too few" in towers.why_blind(blind[:3, :3], captions[:3])


def test_sentences_are_scored_one_by_one() -> None:
    text = "토끼가 3.5미터를 간다. 남자가 본다!\n정말?  끝"
    assert towers.sentences(text) == ["토끼가 3.5미터를 간다.", "남자가 본다!", "정말?", "끝"]


def test_pictures_are_measured_as_they_are(real_clips: list[Frames]) -> None:
    clip = real_clips[0]
    whole, frozen = measure(clip), measure(np.repeat(clip[:1], 16, axis=0))
    assert frozen["motion"] == 0 and frozen["flicker"] == 0 and whole["motion"] > 0.5
    assert measure(damaged(clip, "blurred"))["sharpness"] < 0.5 * whole["sharpness"]
    assert measure(damaged(clip, "noise"))["sharpness"] > whole["sharpness"]
    flicker = (clip * np.where(np.arange(16) % 2, 0.8, 1.0)[:, None, None, None]).astype(np.uint8)
    assert measure(flicker)["flicker"] > 5 * whole["flicker"]
    assert psnr_db(clip, clip) > 90
    assert psnr_db(clip, clip ^ 16) == pytest.approx(20 * np.log10(255 / 16), abs=1e-4)
