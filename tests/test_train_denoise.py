"""Our sampling loop around our model makes the latents of diffusers' pipelines, base and LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from train.denoise import Decoder, Schedule, denoise
from train.lora.adapters import LoRA, attach
from train.lora.files import save_diffusers
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.model.wan import Wan

CPU = torch.device("cpu")
WIDTH_PX, HEIGHT_PX, NUM_FRAMES = 96, 64, 9
SCHEDULE = Schedule(num_steps=8, shift=5.0, guidance=5.0)


def rows(seed: int, num_rows: int) -> Tensor:
    return torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(seed))


def padded(rows_SD: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows_SD, (0, 0, 0, 512 - len(rows_SD)))[None]


NOISE = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(2))
TEXT, EMPTY = rows(0, 20), rows(1, 5)


@pytest.fixture(scope="module")
def lora_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    model = load_transformer(tiny_checkpoint, CPU, torch.float32)
    save_diffusers(tuned(model), path)
    return path


def tuned(model: Wan) -> LoRA:
    """Adapters with an effect; alpha / rank is not 1."""
    lora = attach(model, ["attn1.to_q", "ffn.net.2"], 8, 16.0, dropout=0.5, seed=0)
    generator = torch.Generator().manual_seed(3)
    for factors in lora.tensors().values():
        factors.b.copy_(torch.randn(factors.b.shape, generator=generator))
    lora.refresh()
    return lora


def pipeline(kind: Any, checkpoint: Path, lora_file: Path | None) -> Any:
    pipe = kind.from_pretrained(checkpoint, text_encoder=None, tokenizer=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora_file is not None:
        pipe.load_lora_weights(str(lora_file))
    return pipe


def reference(pipe: Any, **more: Any) -> Tensor:
    latent: Tensor = pipe(
        prompt_embeds=padded(TEXT),
        negative_prompt_embeds=padded(EMPTY),
        latents=NOISE[None].clone(),
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_frames=NUM_FRAMES,
        num_inference_steps=SCHEDULE.num_steps,
        guidance_scale=SCHEDULE.guidance,
        output_type="latent",
        **more,
    ).frames[0]
    return latent


def ours(checkpoint: Path, with_lora: bool, first_frame_C1hw: Tensor | None = None) -> Tensor:
    model = load_transformer(checkpoint, CPU, torch.float32)
    if with_lora:
        tuned(model)
    attention = choose_attention("math", CPU, torch.float32).attention
    return denoise(
        model.eval(),
        attention,
        text_SD=TEXT,
        empty_SD=EMPTY,
        noise_CThw=NOISE,
        schedule=SCHEDULE,
        first_frame_C1hw=first_frame_C1hw,
    )


def relative_error(ours_CThw: Tensor, theirs_CThw: Tensor) -> float:
    return float((ours_CThw - theirs_CThw).norm() / theirs_CThw.norm())


@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_text_to_video_equals_wan_pipeline(
    tiny_checkpoint: Path, lora_file: Path, with_lora: bool
) -> None:
    pipe = pipeline(WanPipeline, tiny_checkpoint, lora_file if with_lora else None)
    assert pipe.scheduler.config.flow_shift == SCHEDULE.shift
    assert relative_error(ours(tiny_checkpoint, with_lora), reference(pipe)) < 1e-5


@pytest.mark.parametrize("with_lora", [False, True], ids=["base", "lora"])
def test_image_to_video_equals_wan_image_to_video_pipeline(
    tiny_checkpoint: Path, lora_file: Path, with_lora: bool
) -> None:
    pipe = pipeline(WanImageToVideoPipeline, tiny_checkpoint, lora_file if with_lora else None)
    levels = np.random.default_rng(0).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    image = Image.fromarray(levels)
    pixels = pipe.video_processor.preprocess(image, height=HEIGHT_PX, width=WIDTH_PX)
    with torch.no_grad():
        first_1C1hw = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    first_C1hw = ((first_1C1hw - mean) / std)[0]
    latent = ours(tiny_checkpoint, with_lora, first_C1hw)
    assert relative_error(latent, reference(pipe, image=image)) < 1e-5
    assert torch.equal(latent[:, :1], first_C1hw)


def test_a_lora_changes_the_latent(tiny_checkpoint: Path) -> None:
    assert relative_error(ours(tiny_checkpoint, True), ours(tiny_checkpoint, False)) > 0.01


def test_the_decoder_makes_the_frames_of_the_pipeline(tiny_checkpoint: Path) -> None:
    pipe = pipeline(WanPipeline, tiny_checkpoint, None)
    frames = pipe(
        prompt_embeds=padded(TEXT),
        negative_prompt_embeds=padded(EMPTY),
        latents=NOISE[None].clone(),
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_frames=NUM_FRAMES,
        num_inference_steps=SCHEDULE.num_steps,
        guidance_scale=SCHEDULE.guidance,
        output_type="np",
    ).frames[0]
    decoded = Decoder(tiny_checkpoint, CPU).decode(ours(tiny_checkpoint, with_lora=False))
    assert decoded.shape == (NUM_FRAMES, HEIGHT_PX, WIDTH_PX, 3)
    assert np.abs(decoded.astype(float) - frames * 255).max() < 1.0


def test_a_latent_with_nan_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        Decoder(tiny_checkpoint, CPU).decode(torch.full((48, 3, 4, 6), float("nan")))
