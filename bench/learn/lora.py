"""A LoRA on the held-out subject, by the trainer's own step, and samples of base and LoRA.

Shapes: N windows, K captions, C latent channels, T/h/w latent frames, rows and columns.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.learn.footage import SHIFT, Footage
from bench.our_step import update
from loader.batch import Batch
from loader.feed_config import FeedConfig
from loader.order import sample_seed
from tools.fake.learned_clips import BUCKET
from train import optim, setup
from train.config import TrainConfig
from train.denoise import Schedule, denoise
from train.flow import FlowConfig
from train.lora.adapters import TARGETS
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import Inputs, prepare

SAMPLES = Schedule(num_steps=20, shift=SHIFT, guidance=3.0)


def open_run(model: Path, device: torch.device, num_steps: int, seed: int) -> Run:
    """A run as train/main.py has one, rank 16 on all layers; its base is the learned model."""
    config = TrainConfig(
        output="",
        model=ModelConfig(
            path=str(model), dtype="bfloat16" if device.type == "cuda" else "float32"
        ),
        data=FeedConfig(datasets=[""]),
        lora=LoRAConfig(targets=list(TARGETS), rank=16, alpha=16.0),
        flow=FlowConfig(shift=SHIFT),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=min(50, num_steps)),
        num_steps=num_steps,
        global_batch=4,
        micro_batch=4,
        seed=seed,
        activation_memory="all",
    )
    return setup.build(config, World(0, 1, device), [BUCKET])


def optimizer_step(run: Run, inputs: Inputs, step: int) -> Tensor:
    """One step as train/main.py does it, of one micro-batch on one process. Returns the losses,
    float32 [B].
    """
    config = run.config
    run.flat.buffer.zero_()
    losses_B = run.micro_step.forward(inputs)
    run.micro_step.backward()
    lr = optim.learning_rate(step, config.num_steps, config.optim)
    optim.set_learning_rate(run.optimizer, lr, config.optim)
    update(run)
    return losses_B


def train_lora(run: Run, footage: Footage, latent_NCThw: Tensor) -> dict[str, Any]:
    """Train on the held-out subject's windows, those excluded from all training left out."""
    config, start_s = run.config, time.perf_counter()
    windows = torch.nonzero(footage.held_out_N & ~footage.excluded_N)[:, 0].tolist()
    generator = torch.Generator().manual_seed(config.seed)
    losses: list[Tensor] = []
    for step in range(config.num_steps):
        drawn = torch.randint(len(windows), (config.global_batch,), generator=generator)
        numbers = [windows[i] for i in drawn.tolist()]
        batch = Batch(
            latent_NCThw[numbers].half(),
            footage.text_KSD[footage.caption_N[numbers]].half(),
            None,
            is_i2v=[False] * len(numbers),
            caption_dropped=[False] * len(numbers),
            seeds=[sample_seed(config.seed, step, str(number)) for number in numbers],
            keys=[str(number) for number in numbers],
            bucket=BUCKET,
            dataset=0,
            epoch=step,
            index=step,
            wait_s=0.0,
        )
        losses_B = optimizer_step(run, prepare(batch, run.laws), step)
        losses.append(losses_B.mean())
    tail = torch.stack(losses[-100:]).mean()
    measured = {
        "steps": config.num_steps,
        "passes": config.num_steps * config.global_batch,
        "seconds": round(time.perf_counter() - start_s, 1),
        "loss_of_last_100_steps": round(float(tail), 4),
    }
    print("lora", measured, flush=True)
    return measured


def sample(run: Run, footage: Footage, caption: int, seed: int, num_steps: int) -> Tensor:
    """A latent, float32 [C, T, h, w]."""
    shape = (48, 3, BUCKET.height_px // 16, BUCKET.width_px // 16)
    generator = torch.Generator().manual_seed(sample_seed(seed, 0, str(caption)))
    device = footage.text_KSD.device
    run.model.eval()
    return denoise(
        run.model,
        run.kernels.attention,
        text_SD=footage.text_KSD[caption, : footage.text_rows[caption]],
        empty_SD=footage.empty_SD[: footage.empty_rows],
        noise_CThw=torch.randn(shape, generator=generator).to(device),
        schedule=SAMPLES._replace(num_steps=num_steps),
    )


def nearest_subject(latent_CThw: Tensor, footage: Footage, latent_NCThw: Tensor) -> str:
    """Whose window is nearest, by the mean square of the latents' difference."""
    distances_N = (latent_NCThw - latent_CThw).square().mean((1, 2, 3, 4))
    return footage.subjects[int(footage.subject_N[int(distances_N.argmin())])]


def retrieval(
    latents: dict[int, Tensor], footage: Footage, latent_NCThw: Tensor, subjects: list[str]
) -> float:
    """Of the captions of `subjects`, the share whose sample is nearest to its own subject."""
    own = [k for k in latents if footage.caption_subjects[k] in subjects]
    right = sum(
        nearest_subject(latents[k], footage, latent_NCThw) == footage.caption_subjects[k]
        for k in own
    )
    return round(right / max(len(own), 1), 3)
