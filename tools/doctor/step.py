"""One optimizer step, timed: a micro-batch of the run's largest shape through the run's own model,
put together as train/main.py does it. It is the last check, because all others have to hold for it.
"""

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from loader import models
from loader.shape import Bucket
from tools.budget import buckets_of, order_of
from tools.counts import num_parameters
from tools.doctor.finding import Finding
from tools.doctor.run import missing_files
from tools.fake.step import random_batch, random_transformer
from train import optim, setup
from train.base import base_kind, transformer_folder
from train.choices import micro_shapes
from train.config import TrainConfig
from train.model.load import read_config
from train.model.wan import TI2V_5B
from train.parallel.mesh import World
from train.run import Run
from train.step import prepare

NAME = "one step"
# a step of TI2V-5B takes hours on a CPU; what tests and demos train takes a moment
MAX_CPU_PARAMETERS = 200_000_000
USUAL = Bucket(1280, 704, 49)


def one_step(config: TrainConfig) -> Iterator[Finding]:
    """The second of two steps on one card, or on the CPU for a small model; random weights of the
    model's size where its own are missing; on a card without a dataset the usual shape.
    """
    sequence = config.parallel.sequence
    if sequence > 1:
        yield Finding(NAME, "skipped", f"parallel.sequence = {sequence} takes as many processes")
        return
    folder = Path(config.model.path) / transformer_folder(config)
    has_weights, has_config = not missing_files(folder), (folder / "config.json").exists()
    wan = read_config(folder / "config.json") if has_config else TI2V_5B
    kind = base_kind(config) if has_config else models.TI2V_5B
    if not torch.cuda.is_available() and sum(num_parameters(wan)) > MAX_CPU_PARAMETERS:
        billions = sum(num_parameters(wan)) / 1e9
        yield Finding(NAME, "skipped", f"no GPU, and {billions:.1f}e9 parameters are too many")
        return
    try:
        bucket, of = (
            max(buckets_of(order_of(config)), key=kind.layout.num_tokens),
            "its largest shape",
        )
    except (ValueError, OSError):
        bucket, of = USUAL, "no shape of the dataset, which can't be read"
        if not torch.cuda.is_available():
            yield Finding(NAME, "skipped", f"no GPU, and {of}")
            return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    num_samples = micro_shapes(config, 1, [bucket], kind.layout)[bucket].batch
    alone = msgspec.structs.replace(config, global_batch=num_samples)
    model = None
    if not has_weights:
        model = random_transformer(wan, device, getattr(torch, config.model.dtype))
    try:
        run = setup.build(alone, World(0, 1, device), [bucket], model=model)
        seconds, loss = _timed(run, bucket, num_samples)
    except torch.OutOfMemoryError as error:
        yield Finding(
            NAME,
            "failure",
            f"{bucket} x {num_samples} does not fit: {str(error).splitlines()[0]}",
            "python -m tools.plan CONFIG.toml says what takes how much, and what to change",
        )
        return
    text = f"{bucket} x {num_samples} ({of}) in {seconds:.3g} s, loss {loss:.3f}, "
    text += f"{config.model.dtype}, {run.kernels.names} attention"
    if device.type == "cuda":
        text += f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at the peak"
    if not has_weights:
        text += ", with random weights: the model's own are not complete"
    finite = loss == loss and abs(loss) != float("inf")
    advice = "" if finite else "use another model.dtype, and check model.path"
    yield Finding(NAME, "ok" if finite else "failure", text, advice)
    del run, model
    gc.collect()


def _timed(run: Run, bucket: Bucket, num_samples: int) -> tuple[float, float]:
    """(seconds, loss) of the second step: the first one compiles and chooses."""
    device = run.world.device
    batch = random_batch(
        bucket,
        device,
        is_i2v=[number % 2 == 1 and run.kind.i2v_share != 0 for number in range(num_samples)],
        text_dim=run.model.config.text_dim,
        kind=run.kind,
    )
    seconds, loss = 0.0, float("nan")
    for _ in range(2):
        begin_s = time.perf_counter()
        run.flat.buffer.zero_()
        losses_B = run.micro_step.forward(prepare(batch, run.laws))
        loss = float(losses_B.mean())
        run.micro_step.backward()
        run.scaler.unscale_(run.optimizer)
        optim.clip_gradient(run.flat.gradient, run.config.optim.clip_norm)
        run.scaler.step(run.optimizer)
        optim.update_scale(run.scaler, run.scales_loss)
        run.adapters.refresh()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin_s
    return seconds, loss
