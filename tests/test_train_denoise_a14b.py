"""Samples of one expert are its part of what diffusers' pipelines do: the high-noise one's estimate
at the boundary, the low-noise one's steps from a clip with noise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from loader.models import I2V_A14B, T2V_A14B, TRANSFORMER_OF, Expert
from train.denoise import Schedule, denoise, schedule_steps
from train.model.attention import choose_attention
from train.model.load import load_transformer

CPU = torch.device("cpu")
WIDTH_PX, HEIGHT_PX, NUM_FRAMES = 48, 32, 9
HIGH = Schedule(
    num_steps=8, shift=5.0, guidance=2.5, expert="high", boundary=T2V_A14B.boundary or 0
)
LOW = HIGH._replace(expert="low", guidance=1.5)
NOISE = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
CLIP = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(4))


def rows(seed: int, num_rows: int) -> Tensor:
    return torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(seed))


TEXT, EMPTY = rows(0, 20), rows(1, 5)


def padded(rows_SD: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows_SD, (0, 0, 0, 512 - len(rows_SD)))[None]


def ours(model_dir: Path, expert: Expert, **more: Any) -> Tensor:
    model = load_transformer(model_dir, CPU, torch.float32, TRANSFORMER_OF[expert])
    return denoise(
        model.eval(),
        choose_attention("math", CPU, torch.float32).attention,
        text_SD=TEXT,
        empty_SD=EMPTY,
        noise_CThw=NOISE,
        schedule=HIGH if expert == "high" else LOW,
        **more,
    )


def guided(pipe: Any, name: str, x_1CThw: Tensor, t: Tensor, guidance: float) -> Tensor:
    """The velocity of one of the pipeline's transformers."""
    transformer = getattr(pipe, name)
    with torch.no_grad():
        with_text, without = (
            transformer(x_1CThw, t.expand(1), padded(each), return_dict=False)[0]
            for each in (TEXT, EMPTY)
        )
    velocity: Tensor = without + guidance * (with_text - without)
    return velocity


def open_pipeline(kind: Any, model_dir: Path) -> Any:
    pipe = kind.from_pretrained(model_dir, text_encoder=None, tokenizer=None, dtype=torch.float32)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_after_each_step(pipe: Any, **more: Any) -> list[Tensor]:
    """Of the whole pipeline, both experts."""
    found = []

    def keep(pipe: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(values["latents"].clone())
        return values

    pipe(
        prompt_embeds=padded(TEXT),
        negative_prompt_embeds=padded(EMPTY),
        latents=NOISE[None].clone(),
        width=WIDTH_PX,
        height=HEIGHT_PX,
        num_frames=NUM_FRAMES,
        num_inference_steps=HIGH.num_steps,
        guidance_scale=HIGH.guidance,
        guidance_scale_2=LOW.guidance,
        output_type="latent",
        callback_on_step_end=keep,
        **more,
    )
    return found


def close(ours_CThw: Tensor, theirs_1CThw: Tensor) -> bool:
    difference = (ours_CThw - theirs_1CThw[0]).norm() / theirs_1CThw.norm()
    return float(difference) < 1e-5


def test_the_high_noise_expert_ends_with_the_pipelines_estimate_at_the_boundary(
    tiny_model: Callable[[str], Path],
) -> None:
    model_dir = tiny_model("t2v-a14b")
    pipe = open_pipeline(WanPipeline, model_dir)
    latents = latents_after_each_step(pipe)
    scheduler, first, end = schedule_steps(HIGH)
    assert first == 0 and 1 < end < HIGH.num_steps
    x_1CThw, sigma = latents[end - 2], scheduler.sigmas[end - 1]
    v_1CThw = guided(pipe, "transformer", x_1CThw, scheduler.timesteps[end - 1], HIGH.guidance)
    assert close(ours(model_dir, "high"), x_1CThw - sigma * v_1CThw)


def test_the_low_noise_expert_denoises_a_clip_from_the_boundary_on(
    tiny_model: Callable[[str], Path],
) -> None:
    model_dir = tiny_model("t2v-a14b")
    pipe = open_pipeline(WanPipeline, model_dir)
    scheduler, first, _ = schedule_steps(LOW)
    sigma = scheduler.sigmas[first]
    assert sigma < LOW.boundary
    x_1CThw = ((1 - sigma) * CLIP + sigma * NOISE)[None]
    scheduler.set_begin_index(first)
    for t in scheduler.timesteps[first:]:
        v_1CThw = guided(pipe, "transformer_2", x_1CThw, t, LOW.guidance)
        x_1CThw = scheduler.step(v_1CThw, t, x_1CThw, return_dict=False)[0]
    found = ours(model_dir, "low", start_CThw=CLIP)
    assert close(found, x_1CThw)
    # noise is all that it may change: with less of it the clip comes back
    assert (found - CLIP).norm() < (NOISE - CLIP).norm() * 2


def test_image_to_video_gets_its_first_frame_as_the_pipeline_gives_it(
    tiny_model: Callable[[str], Path],
) -> None:
    model_dir = tiny_model("i2v-a14b")
    pipe = open_pipeline(WanImageToVideoPipeline, model_dir)
    levels = np.random.default_rng(0).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    image = Image.fromarray(levels)
    latents = latents_after_each_step(pipe, image=image)

    pixels = pipe.video_processor.preprocess(image, height=HEIGHT_PX, width=WIDTH_PX)
    video_BCFHW = torch.cat([pixels[:, :, None], torch.zeros(1, 3, NUM_FRAMES - 1, 32, 48)], dim=2)
    config = pipe.vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        given_1CThw = (pipe.vae.encode(video_BCFHW).latent_dist.mode() - mean) / std
    mask_1CThw = torch.zeros(1, 4, 3, 4, 6)
    mask_1CThw[:, :, 0] = 1

    schedule = HIGH._replace(boundary=I2V_A14B.boundary or 0)
    scheduler, _, end = schedule_steps(schedule)
    x_1CThw, sigma = latents[end - 2], scheduler.sigmas[end - 1]
    input_1CThw = torch.cat([x_1CThw, mask_1CThw, given_1CThw], dim=1)
    t = scheduler.timesteps[end - 1]
    v_1CThw = guided(pipe, "transformer", input_1CThw, t, HIGH.guidance)
    model = load_transformer(model_dir, CPU, torch.float32)
    found = denoise(
        model.eval(),
        choose_attention("math", CPU, torch.float32).attention,
        text_SD=TEXT,
        empty_SD=EMPTY,
        noise_CThw=NOISE,
        schedule=schedule,
        given_CThw=given_1CThw[0],
    )
    assert close(found, x_1CThw - sigma * v_1CThw)


def test_too_few_steps_leave_none_for_the_low_noise_expert() -> None:
    with pytest.raises(ValueError, match=r"samples.num_steps = 2: none of so few steps"):
        schedule_steps(LOW._replace(num_steps=2, shift=12.0))
