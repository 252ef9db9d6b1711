"""LoRAs that are wrong on purpose, which an evaluation must call worse than the base:

    shuffled   trained on each sample with the caption of another one
    sign       trained towards the target's negative

By the trainer's own step, on the demo's shards and with its configuration, for fewer steps.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from bench.learn.lora import optimizer_step
from loader.config import load_toml
from train import setup
from train.config import TrainConfig
from train.lora import files as lora_files
from train.parallel.mesh import World
from train.step import Inputs, prepare

CONFIG = Path("configs/train/learned.toml")


def shuffled(inputs: Inputs) -> Inputs:
    """Captions move one sample on, the last one's to the first."""
    return inputs._replace(text_BSD=inputs.text_BSD.roll(1, 0))


def wrong_sign(inputs: Inputs) -> Inputs:
    return inputs._replace(target_BCThw=-inputs.target_BCThw)


CONTROLS: dict[str, Callable[[Inputs], Inputs]] = {"shuffled": shuffled, "sign": wrong_sign}


def train_control(name: str, config: TrainConfig, path: Path) -> float:
    """Write the LoRA to `path`. Returns its loss, towards what it was taught, over the last tenth
    of the steps. Raises ValueError for datasets that can't be used.
    """
    losses: list[torch.Tensor] = []
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with setup.open_feed(config, world) as feed:
        run = setup.build(config, world, feed.buckets)
        for step in range(config.num_steps):
            batch, _ = next(feed)
            inputs = CONTROLS[name](prepare(batch, run.laws))
            losses.append(optimizer_step(run, inputs, step).mean())
    lora_files.save_diffusers(run.adapters, path)
    return float(torch.stack(losses[-max(1, config.num_steps // 10) :]).mean())


def train_controls(output: Path, num_steps: int, seed: int) -> None:
    """Write OUTPUT/shuffled.safetensors and OUTPUT/sign.safetensors."""
    config = load_toml(CONFIG, TrainConfig, [f"seed={seed}", f"num_steps={num_steps}"])
    # captions are shuffled within a micro-batch
    config = msgspec.structs.replace(config, micro_batch=config.global_batch)
    for name in CONTROLS:
        path = output / f"{name}.safetensors"
        loss = train_control(name, config, path)
        print(f"{path}: {num_steps} steps, loss {loss:.3f}", flush=True)
