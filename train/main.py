"""Fine-tune Wan2.2 with LoRA:  torchrun --nproc-per-node 2 train/main.py CONFIG.toml [--set key=value ...]

The whole program is on this page: build, loop, save. A run whose output folder has checkpoints
goes on from the newest one, exactly (on a GPU bit for bit with `deterministic`). Nothing random
comes from a global generator: what happens to a sample follows from its seed.
"""

import argparse
import logging
import sys
from collections import deque
from contextlib import ExitStack
from pathlib import Path

# torchrun puts train/ there, not the root
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from loader.config import dump_toml, load_toml
from loader.shape import WAN22
from train import checkpoint, optim, setup
from train.config import TrainConfig
from train.lora import files as lora_files
from train.metrics import Metrics, Report, Scalars, Stopwatch, peak_memory_gib, record_of
from train.parallel import mesh
from train.parallel.mesh import World
from train.step import prepare


def train(config: TrainConfig, world: World, stack: ExitStack) -> None:
    # -- build and resume --------------------------------------------------------------------
    feed = stack.enter_context(setup.open_feed(config, world))
    run = setup.build(config, world, feed.buckets, feed_bytes=setup.feed_bytes(config, feed))
    output, device, flat = config.output_dir, world.device, run.flat
    resumed_from = checkpoint.latest(output)
    first_step = run.resume(feed)
    # rank 0 may delete and write checkpoints only after everyone has read theirs
    mesh.barrier(world)
    metrics = (
        stack.enter_context(Metrics(output, first_step, config.num_steps))
        if world.is_main
        else None
    )
    if metrics:
        (output / "config.toml").write_text(dump_toml(config), encoding="utf-8")
        for line in run.describe():
            metrics.say(line)
        metrics.say(f"resumed from {resumed_from}" if resumed_from else "from the start")

    stopwatch, logged_step, num_tokens = Stopwatch(device), first_step, 0
    reports: deque[Report] = deque()
    for step in range(first_step, config.num_steps):
        flat.buffer.zero_()
        for _ in range(run.num_micro):
            batch, feed_state = next(feed)
            stopwatch.lap("data_wait_s")
            loss = run.micro_step.forward(prepare(batch, config.flow))
            flat.loss.add_(loss / (run.num_micro * world.data_size))
            stopwatch.lap("forward_s")
            run.micro_step.backward()
            stopwatch.lap("backward_s")
            num_tokens += WAN22.num_tokens(batch.bucket) * len(batch.keys) * world.data_size
        mesh.all_reduce_sum(flat.buffer, world)
        stopwatch.lap("sync_s")
        lr = optim.learning_rate(step, config.num_steps, config.optim)
        run.optimizer.param_groups[0]["lr"] = lr
        run.scaler.unscale_(run.optimizer)
        grad_norm = optim.clip_gradient(flat.gradient, config.optim.clip_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.adapters.refresh()
        stopwatch.lap("optimizer_s")

        done = step + 1
        save = done % config.checkpoint_every == 0 or done == config.num_steps
        if save or done % config.log_every == 0:
            scale = run.scaler.scale(torch.ones((), device=device))
            scalars = Scalars(flat.loss, grad_norm, scale)
            reports.append(
                Report(
                    done,
                    done - logged_step,
                    batch.epoch,
                    lr,
                    scalars,
                    num_tokens,
                    stopwatch.split(),
                    peak_memory_gib(device),
                )
            )
            logged_step, num_tokens = done, 0
        # a step late, so that the device has the next one to work on
        while reports and (save or len(reports) > 1):
            record = record_of(reports.popleft())
            if optim.is_lost(
                float(record["loss"] or 0.0),
                float(record["grad_norm"] or 0.0),
                float(record["loss_scale"] or 0.0),
                run.scaler.is_enabled(),
            ):
                # the same on all ranks; nothing of this is saved
                raise ValueError(
                    f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}, "
                    f"loss scale {record['loss_scale']}. Start a new output with a lower optim.lr, from "
                    f"lora.init = the {lora_files.DIFFUSERS_FILE} in "
                    f"{checkpoint.latest(output) or 'an earlier run'}"
                )
            if metrics:
                metrics.write(record)
        if metrics and save:
            run.save_checkpoint(done, feed_state)
        stopwatch.lap("other_s")
    mesh.barrier(world)
    if metrics:
        lora_files.save_both(run.adapters, output)
        metrics.say(
            f"{config.num_steps} steps done: {output / lora_files.DIFFUSERS_FILE} (diffusers), "
            f"{output / lora_files.COMFYUI_FILE} (ComfyUI)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fine-tune Wan2.2 with LoRA on a dataset of shardgen."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override one key of the file",
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="train: %(message)s")
    logging.getLogger("loader").setLevel(logging.INFO)  # the samples that each epoch leaves out
    try:
        with ExitStack() as stack:
            train(
                load_toml(arguments.config, TrainConfig, arguments.set),
                stack.enter_context(mesh.process_group()),
                stack,
            )
    except torch.OutOfMemoryError as error:
        sys.exit(
            f'train: {error}\ntrain: the GPU\'s memory is full. Set activation_memory to "block" or a '
            f"smaller budget than it chose, activation_offload = true, cuda_graph_tokens = 0, micro_batch = 1, or "
            f"build smaller windows.buckets"
        )
    except (
        ValueError,
        OSError,
    ) as error:  # every fault of the user's is one of these, and says what to do
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    main()
