"""Fine-tune Wan2.2 with LoRA on a dataset of shardgen.

    torchrun --nproc-per-node 2 train/main.py CONFIG.toml [--set key=value ...]

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
from train.model.attention import describe
from train.open_sampler import open_sampler
from train.parallel import mesh
from train.progress import Progress, Report
from train.records import StepRecord
from train.sampling import Sampler
from train.step import prepare
from train.stopwatch import Scalars, Stopwatch, peak_memory_gib
from train.validator import Validator, open_validator

BEST_FOLDER = "best"


def train(config: TrainConfig, world: mesh.World, stack: ExitStack) -> None:
    # -- build and resume --------------------------------------------------------------------
    feed = stack.enter_context(setup.open_feed(config, world))
    run = setup.build(config, world, feed.buckets, feed_bytes=setup.feed_bytes(config, feed))
    validator, sampler = open_validator(run), open_sampler(run)
    resumed = run.resume(feed)
    first_step = resumed.num_done
    if validator:
        stack.callback(validator.close)
        if resumed.validation:
            validator.load_state_dict(resumed.validation)
    # the main process may delete and write checkpoints only after everyone has read theirs
    mesh.barrier(world)
    progress = None
    if world.is_main:
        progress = stack.enter_context(Progress(config.output_dir, first_step, config.num_steps))
        # what was chosen of "auto" follows as comments
        chosen = "".join(f"# {line}\n" for line in describe(run.kernels))
        (config.output_dir / "config.toml").write_text(dump_toml(config) + chosen, encoding="utf-8")
        for line in run.describe():
            progress.say(line)
    # -- the base, before the first step -------------------------------------------------------
    if validator and first_step == 0:
        validate(validator, 0, run, progress)
    if sampler and first_step == 0:
        sample(sampler, 0, progress)

    # names for what the loop uses most
    flat, scaler, optimizer, micro_step = run.flat, run.scaler, run.optimizer, run.micro_step
    share = config.global_batch // world.data_size
    stopwatch, num_tokens, logged_step = Stopwatch(world.device), 0, first_step
    reports: deque[Report] = deque()
    done, stops = first_step, False
    for step in range(first_step, config.num_steps):
        # -- one optimizer step: forward and backward of this process's micro-batches --------
        flat.buffer.zero_()
        num_samples = 0
        while num_samples < share:
            batch, feed_state = next(feed)
            num_samples += len(batch.keys)
            stopwatch.lap("data_wait_s")
            loss = micro_step.forward(prepare(batch, config.flow))
            flat.loss.add_(loss / (config.global_batch // len(batch.keys)))
            stopwatch.lap("forward_s")
            micro_step.backward()
            stopwatch.lap("backward_s")
            num_tokens += WAN22.num_tokens(batch.bucket) * len(batch.keys) * world.data_size
        # gradient and loss of all processes, summed as one vector
        mesh.all_reduce_sum(flat.buffer, world)
        stopwatch.lap("sync_s")
        # clip, step, and renew the copies of the adapters that GEMMs read
        lr = optim.learning_rate(step, config.num_steps, config.optim)
        optimizer.param_groups[0]["lr"] = lr
        scaler.unscale_(optimizer)
        grad_norm = optim.clip_gradient(flat.gradient, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        run.adapters.refresh()
        stopwatch.lap("optimizer_s")

        done = step + 1
        validates = validator is not None and run.is_due(done, config.validation.every)
        # a step that was validated has a checkpoint, so that the best one can be had again
        saves = validates or run.is_due(done, config.checkpoint_every)
        # -- once in a while: log ------------------------------------------------------------
        if saves or done % config.log_every == 0:
            report = Report(
                step=done,
                num_steps=done - logged_step,
                num_tokens=num_tokens,
                laps=stopwatch.split(),
                scalars=Scalars(flat.loss, grad_norm, run.loss_scale()),
                epoch=batch.epoch,
                lr=lr,
                memory_gib=peak_memory_gib(world.device),
            )
            reports.append(report)
            num_tokens, logged_step = 0, done
        # read a step late, so that the device has the next one to work on, but before saving
        while len(reports) > (0 if saves else 1):
            record = reports.popleft().record()
            stop_if_lost(record, run)
            if progress:
                progress.write(record)
        # -- once in a while: validate -------------------------------------------------------
        if validator and validates:
            validate(validator, done, run, progress)
            stops = validator.stops(config.early_stop.patience)
        # -- once in a while: a few clips ----------------------------------------------------
        if sampler and (stops or run.is_due(done, config.samples.every)):
            sample(sampler, done, progress)
        # -- once in a while: checkpoint -----------------------------------------------------
        if saves and world.is_main:
            run.save_checkpoint(done, feed_state, validator.state_dict() if validator else None)
        stopwatch.lap("other_s")
        if stops:
            break

    mesh.barrier(world)
    if progress:
        lora_files.save_both(run.adapters, config.output_dir)
        diffusers, comfyui = lora_files.DIFFUSERS_FILE, lora_files.COMFYUI_FILE
        progress.say(
            f"{done} steps done: {config.output_dir / diffusers} (diffusers), "
            f"{config.output_dir / comfyui} (ComfyUI)"
        )
        if stops and validator:
            progress.say(
                f"stopped early: {config.early_stop.patience} validations without an improvement "
                f"beyond its error; the best was step {validator.best_steps[0]}, whose LoRA is in "
                f"{config.output_dir / BEST_FOLDER}"
            )


def validate(validator: Validator, step: int, run: setup.Run, progress: Progress | None) -> None:
    """Validate on all ranks together; the main one logs it and saves the LoRA if it is the best."""
    record = validator.validate(step)
    if progress:
        progress.write_validation(record)
        if record.best_step == step:
            folder = run.config.output_dir / BEST_FOLDER
            folder.mkdir(exist_ok=True)
            lora_files.save_both(run.adapters, folder)


def sample(sampler: Sampler, step: int, progress: Progress | None) -> None:
    """Make the clips on all ranks together; the main one logs them."""
    event = sampler.sample(step)
    if progress:
        progress.show_samples(event, sampler.folder_of(step))


def stop_if_lost(record: StepRecord, run: setup.Run) -> None:
    """Raise ValueError where training can't go on from this step: on all processes, because they
    have the same numbers, and before anything of it is saved.
    """
    loss, grad_norm, loss_scale = record.loss, record.grad_norm, record.loss_scale
    assert loss is not None and grad_norm is not None and loss_scale is not None
    if not optim.is_lost(loss, grad_norm, loss_scale, scaling=run.scaler.is_enabled()):
        return
    newest = checkpoint.latest(run.config.output_dir) or "an earlier run"
    raise ValueError(
        f"step {record.step}: loss {loss}, gradient norm {grad_norm}, loss scale {loss_scale}. "
        f"Start a new output with a lower optim.lr, from lora.init = the "
        f"{lora_files.DIFFUSERS_FILE} in {newest}"
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
            config = load_toml(arguments.config, TrainConfig, arguments.set)
            train(config, stack.enter_context(mesh.process_group()), stack)
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"train: {error}\n"
            f'train: the GPU\'s memory is full. Set activation_memory to "block" or a smaller '
            f"budget than it chose, activation_offload = true, cuda_graph_tokens = 0, "
            f"micro_batch = 1, or build smaller windows.buckets"
        )
    except (ValueError, OSError) as error:
        # every fault of the user's is one of these, and says what to do
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    main()
