"""The small VAE of Wan2.2's layout, trained on whole windows.

Shapes: N windows, B of a batch, C channels, F/H/W frames and pixels, T/h/w of the latent.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from bench.learn.footage import Footage, pixels_of
from bench.learn.training import Clock, GraphedTraining, autocast
from tools.fake.vae import WAN22

PEAK_LR = 2e-3
CHUNK = 16  # windows encoded at once
# of the latent's deviation: so that the decoder bears what a denoiser leaves
LATENT_NOISE = 0.05


def small_vae(device: torch.device) -> AutoencoderKLWan:
    """2.9 million parameters; its latents are not normalised yet."""
    kind = {**WAN22, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    vae = AutoencoderKLWan(base_dim=16, decoder_base_dim=16, num_res_blocks=1, **kind).to(device)
    with torch.no_grad():
        for parameter in vae.parameters():
            # the tensor cores' layout; cuDNN has no fast half-precision kernels for the other
            if parameter.dim() == 5:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last_3d)
            elif parameter.dim() == 4 and parameter.shape[-1] > 1:
                parameter.data = parameter.contiguous(memory_format=torch.channels_last)
        # decode() clamps to [-1, 1], where no gradient passes: begin in the middle
        vae.decoder.conv_out.weight.mul_(0.1)
    return vae


class Reconstruction(nn.Module):
    """The loss of a batch of pixels in [-1, 1]."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    def forward(self, pixels_BCFHW: Tensor, noise_BCThw: Tensor) -> Tensor:
        latent_BCThw = self.vae.encode(pixels_BCFHW).latent_dist.mean
        deviation = latent_BCThw.detach().float().std()
        noised_BCThw = latent_BCThw + LATENT_NOISE * deviation * noise_BCThw
        error = self.vae.decode(noised_BCThw).sample.float() - pixels_BCFHW
        size = latent_BCThw.float().square().mean()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * size


def train_vae(
    footage: Footage, *, seconds: float, max_steps: int, batch: int, graphed: bool, seed: int
) -> tuple[AutoencoderKLWan, dict[str, object]]:
    """Train on every window that is not excluded, the held-out subject's too: a VAE is no part of
    what a LoRA is taught. Returns it and what was measured.
    """
    device = footage.pixels_NCFHW.device
    torch.manual_seed(seed)
    vae = small_vae(device)
    training = torch.nonzero(~footage.excluded_N)[:, 0]

    def draw() -> tuple[Tensor, Tensor]:
        chosen = training[torch.randint(len(training), (batch,), device=device)]
        pixels_BCFHW = pixels_of(footage.pixels_NCFHW, chosen)
        _, _, frames, height, width = pixels_BCFHW.shape
        latent = (batch, 48, (frames - 1) // 4 + 1, height // 16, width // 16)
        return pixels_BCFHW, torch.randn(latent, device=device)

    trainer = GraphedTraining(vae, Reconstruction(vae), draw(), weight_decay=1e-4, graphed=graphed)
    clock, loss = Clock(seconds, max_steps), torch.zeros(())
    while clock.next():
        loss = trainer.step(draw(), clock.lr(PEAK_LR, 100))
        if clock.num_steps % 500 == 0:
            psnr = measure_psnr(vae, footage)
            print(
                f"vae {clock.num_steps} steps, {clock.elapsed_s:.0f} s: loss {float(loss):.4f}, "
                f"PSNR of excluded windows {psnr}",
                flush=True,
            )
    del trainer
    measured = {
        "steps": clock.num_steps,
        "batch": batch,
        "seconds": round(clock.elapsed_s, 1),
        "loss": float(loss),
        "psnr_db_excluded": measure_psnr(vae, footage),
    }
    print("vae", measured, flush=True)
    return vae, measured


@torch.no_grad()
def measure_psnr(vae: AutoencoderKLWan, footage: Footage) -> dict[str, float]:
    """Mean PSNR in dB over each subject's excluded windows."""
    found: dict[str, list[float]] = {}
    for some in torch.nonzero(footage.excluded_N)[:, 0].split(CHUNK):
        pixels_BCFHW = pixels_of(footage.pixels_NCFHW, some)
        with autocast(pixels_BCFHW.device):
            decoded = vae.decode(vae.encode(pixels_BCFHW).latent_dist.mean).sample.float()
        error_B = ((decoded - pixels_BCFHW) / 2).square().mean((1, 2, 3, 4))
        for number, error in zip(some.tolist(), error_B.tolist(), strict=True):
            subject = footage.subjects[int(footage.subject_N[number])]
            found.setdefault(subject, []).append(-10 * math.log10(max(error, 1e-10)))
    return {subject: round(sum(x) / len(x), 2) for subject, x in found.items()}


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, footage: Footage) -> Tensor:
    """Latents of all windows, float32 [N, 48, T, h, w], normalised by the statistics of those that
    training sees, which go into the VAE's configuration.
    """
    numbers = torch.arange(len(footage.caption_N), device=footage.pixels_NCFHW.device)
    batches = [
        vae.encode(pixels_of(footage.pixels_NCFHW, some)).latent_dist.mean.float()
        for some in numbers.split(CHUNK)
    ]
    latent_NCThw = torch.cat(batches)
    seen_NCThw = latent_NCThw[~footage.excluded_N]
    mean_C, std_C = seen_NCThw.mean((0, 2, 3, 4)), seen_NCThw.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean_C.tolist(), latents_std=std_C.tolist())
    shape = (1, -1, 1, 1, 1)
    return (latent_NCThw - mean_C.view(shape)) / std_C.view(shape)


def rounded_to_half(network: nn.Module) -> None:
    """Round the weights to what float16 holds, so that what is measured is what is saved."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()


def save_half(network: Any, folder: Path) -> None:
    """As diffusers saves it, contiguous and in float16; the network itself becomes float16."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().contiguous(memory_format=torch.contiguous_format)
    network.save_pretrained(folder)
