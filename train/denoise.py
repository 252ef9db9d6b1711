"""Clips out of the model in training: noise to latent by diffusers' scheduler, latent to frames by
diffusers' VAE.

Our own model runs, adapters attached, as it is trained: no file is written and loaded again, so
what a sample shows is what the run has. Only the order of the calls is ours; tests hold it to
WanPipeline and WanImageToVideoPipeline, and of A14B each half to its part of them.

Shapes: C latent channels, T/h/w latent frames, rows and columns, S text rows, D text width,
F/H/W frames and pixels. One clip at a time: a pair of passes fills a card at these lengths.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loader.models import Expert
from loader.sample import MAX_TEXT_TOKENS
from train import flow
from train.model.attention import Attention
from train.model.wan import Wan

Frames = np.ndarray[Any, Any]  # uint8 RGB [F, H, W, 3]


class Schedule(NamedTuple):
    """How a latent is denoised. shift: of the noise levels, as in training; guidance 1: none.

    A run of one expert has half of a model: its steps alone are made, those on its side of the
    sigma `boundary`. So "high" ends with its last estimate of the clean latent, and "low" starts
    from a clip with noise.
    """

    num_steps: int
    shift: float
    guidance: float
    expert: Expert | None = None
    boundary: float = 0.0


def schedule_steps(schedule: Schedule) -> tuple[Any, int, int]:
    """(diffusers' scheduler, the first step that is made, the one after the last). Raises
    ValueError if none is left for the expert.
    """
    from diffusers import UniPCMultistepScheduler  # seconds to import, and only samples need it

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=schedule.shift,
    )
    scheduler.set_timesteps(schedule.num_steps)
    # as the pipelines of diffusers choose between the two
    num_high = int((scheduler.timesteps >= 1000 * schedule.boundary).sum())
    first, end = 0, schedule.num_steps
    if schedule.expert is not None:
        first, end = (0, num_high) if schedule.expert == "high" else (num_high, end)
    if first == end:
        raise ValueError(
            f"samples.num_steps = {schedule.num_steps}: none of so few steps is below the "
            f"boundary {schedule.boundary:g}, where the low-noise expert works; raise it"
        )
    return scheduler, first, end


def denoise(
    model: Wan,
    attention: Attention,
    *,
    text_SD: Tensor,
    empty_SD: Tensor,
    noise_CThw: Tensor,
    schedule: Schedule,
    first_frame_C1hw: Tensor | None = None,
    given_CThw: Tensor | None = None,
    start_CThw: Tensor | None = None,
    gets_on: Callable[[], None] = lambda: None,
) -> Tensor:
    """One latent, float32 [C, T, h, w], normalised.

    text_SD, empty_SD: UMT5 rows of the prompt and of "" (what guidance is steered away from), at
    most 512, any float dtype. noise_CThw: standard normal, float32. first_frame_C1hw: image to
    video of TI2V-5B; latent frame 0 is this one before every pass and in the result, its tokens get
    t = 0. given_CThw: image to video of A14B, KEY.condition.zst. start_CThw: the clip's latent that
    the low-noise expert starts from. gets_on: called before each step. Raises ValueError if no step
    is left for the expert.
    """
    device = noise_CThw.device
    scheduler, first, end = schedule_steps(schedule)
    scheduler.set_timesteps(schedule.num_steps, device=device)
    text_1SD, empty_1SD = (_padded(rows_SD)[None] for rows_SD in (text_SD, empty_SD))
    first_1C1hw = None if first_frame_C1hw is None else first_frame_C1hw[None].float()
    num_clean_frames_1 = torch.tensor([0 if first_1C1hw is None else 1], device=device)

    def velocity(x_1CThw: Tensor, t_12: Tensor, rows_1SD: Tensor) -> Tensor:
        if given_CThw is not None:
            x_1CThw = flow.with_given(x_1CThw, given_CThw[None])
        return model(x_1CThw, t_12, num_clean_frames_1, rows_1SD, attention)

    x_1CThw = noise_CThw[None].float()
    if first > 0:
        assert start_CThw is not None, "the low-noise expert starts from a clip"
        sigma = scheduler.sigmas[first].to(device)
        x_1CThw = (1 - sigma) * start_CThw[None].float() + sigma * x_1CThw
        scheduler.set_begin_index(first)
    with torch.no_grad():
        for step in range(first, end):
            gets_on()
            t = scheduler.timesteps[step]
            if first_1C1hw is not None:
                x_1CThw = torch.cat([first_1C1hw, x_1CThw[:, :, 1:]], dim=2)
            # the rows of the modulation: the clean frame's timestep, and everyone else's
            t_12 = torch.stack([torch.zeros_like(t), t]).float()[None]
            v_1CThw = velocity(x_1CThw, t_12, text_1SD)
            if schedule.guidance != 1.0:
                without_1CThw = velocity(x_1CThw, t_12, empty_1SD)
                v_1CThw = without_1CThw + schedule.guidance * (v_1CThw - without_1CThw)
            if step + 1 == end < schedule.num_steps:
                # x_s = x0 + s v: what the high-noise expert takes the clip to be
                return (x_1CThw - scheduler.sigmas[step].to(device) * v_1CThw)[0]
            x_1CThw = scheduler.step(v_1CThw, t, x_1CThw, return_dict=False)[0]
    if first_1C1hw is not None:
        x_1CThw = torch.cat([first_1C1hw, x_1CThw[:, :, 1:]], dim=2)
    return x_1CThw[0]


def _padded(rows_SD: Tensor) -> Tensor:
    """Zero rows up to 512, before the text MLP, as in training."""
    return torch.nn.functional.pad(rows_SD, (0, 0, 0, MAX_TEXT_TOKENS - rows_SD.shape[0]))


class Decoder:
    """The VAE's decoder, by diffusers. It waits in the host's memory and is on the device only
    while it decodes. Untiled: tiles give another picture.
    """

    def __init__(self, model_dir: Path, device: torch.device):
        from diffusers import AutoencoderKLWan

        self._device = device
        # float32, as tools.generate decodes: it runs seldom
        self._vae = AutoencoderKLWan.from_pretrained(
            model_dir, subfolder="vae", dtype=torch.float32
        )
        self._vae.requires_grad_(False)
        config = self._vae.config
        self._mean_C111 = torch.tensor(config.latents_mean).view(-1, 1, 1, 1)
        self._std_C111 = torch.tensor(config.latents_std).view(-1, 1, 1, 1)

    def decode(self, latent_CThw: Tensor) -> Frames:
        """A normalised latent [C, T, h, w] as uint8 RGB [F, H, W, 3]. Raises ValueError for NaN."""
        if not bool(torch.isfinite(latent_CThw).all()):
            raise ValueError("a sample's latent holds NaN or infinity")
        mean_C111, std_C111 = (x.to(self._device) for x in (self._mean_C111, self._std_C111))
        self._vae.to(self._device)
        try:
            with torch.no_grad():
                latent_1CThw = (latent_CThw.to(self._device).float() * std_C111 + mean_C111)[None]
                pixels_3FHW = self._vae.decode(latent_1CThw, return_dict=False)[0][0]
            pixels_FHW3 = (pixels_3FHW.float().clamp(-1, 1) / 2 + 0.5).permute(1, 2, 3, 0)
            return np.asarray((pixels_FHW3 * 255).round().to("cpu", torch.uint8).numpy())
        finally:
            self._vae.to("cpu")
