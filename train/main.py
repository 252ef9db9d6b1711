"""Fine-tune Wan2.2 with LoRA:  torchrun --nproc-per-node 2 train/main.py CONFIG.toml [--set key=value ...]

The whole program is on this page: build, loop, save. A run whose output folder has checkpoints
goes on from the newest one, exactly (on a GPU bit for bit with `deterministic`). Nothing random
comes from a global generator: what happens to a sample follows from its seed.
"""

import argparse
import logging
import os
import sys
from collections import deque
from contextlib import ExitStack
from pathlib import Path

# torchrun puts train/ there, not the root
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from loader.config import dump_toml, load_toml
from loader.feed import Feed
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import WAN22
from loader.vae.encoder import load_vae_encoder
from train import checkpoint, optim
from train.activations import plan as remat
from train.config import TrainConfig, flat, resumable_changes
from train.lora import adapters as lora
from train.metrics import Metrics, Report, Scalars, Stopwatch, peak_memory_gib, record_of
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.parallel import mesh as dist
from train.step import MicroStep, prepare


def train(config: TrainConfig, world: dist.World, stack: ExitStack) -> None:
    output, device, dtype = config.output_dir, world.device, getattr(torch, config.model.dtype)
    num_micro, rest = divmod(config.global_batch, config.micro_batch * world.size)
    if rest:
        raise ValueError(
            f"global_batch = {config.global_batch} is not a multiple of micro_batch x processes = "
            f"{config.micro_batch} x {world.size}"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first GEMM runs
        torch.use_deterministic_algorithms(True)
    attention_name, attention = choose_attention(
        config.model.attention, device, dtype, config.deterministic
    )
    # sums over K = 14336 overflow in fp16
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    budget_bytes = remat.parse_activation_memory(config.activation_memory)

    if attention_name == "math" and config.activation_memory not in ("all", "block"):
        raise ValueError(
            f'activation_memory = "{config.activation_memory}": attention = "math" is many small '
            f'operations, none of which can be kept alone; use "all" or "block"'
        )

    model = load_transformer(Path(config.model.path), device, dtype)
    adapters = lora.attach(
        model,
        config.lora.targets,
        config.lora.rank,
        config.lora.alpha,
        config.lora.dropout,
        config.seed,
        nf4=config.lora.base == "nf4",
    )
    newest = checkpoint.latest(output)
    if config.lora.init and newest is None:
        lora.load_diffusers(adapters, Path(config.lora.init))
    flat_parameters = optim.flatten(adapters.parameters())
    optimizer = optim.make_optimizer(
        flat_parameters.vector,
        config.optim.name,
        config.optim.lr,
        (config.optim.beta1, config.optim.beta2),
        config.optim.eps,
        config.optim.weight_decay,
    )
    scaler = torch.amp.GradScaler(
        device.type, config.optim.loss_scale, enabled=dtype == torch.float16
    )
    vae = (
        load_vae_encoder(Path(config.model.path), device, dtype)
        if config.data.condition == "raw"
        else None
    )
    feed = stack.enter_context(
        Feed(
            config.data.datasets,
            split="train",
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            i2v_share=config.data.i2v_share,
            caption_dropout=config.data.caption_dropout,
            condition=config.data.condition,
            device=device,
            num_threads=config.data.num_threads,
            max_ahead=config.data.max_ahead,
            vae=vae,
            weights=config.data.weights or None,
            max_damaged=config.data.max_damaged,
            cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else None,
            cache_bytes=int(config.data.cache_gib * 2**30),
        )
    )

    shapes = {
        bucket: remat.Shape(config.micro_batch, WAN22.num_tokens(bucket), MAX_TEXT_TOKENS)
        for bucket in feed.buckets
    }
    plans = remat.plan_run(
        model.config,
        list(shapes.values()),
        config.lora.targets,
        dtype.itemsize,
        budget_bytes,
        0.0
        if budget_bytes is not None
        else remat.room_bytes(device)
        - 8 * flat_parameters.vector.numel()
        # of the optimizer; of the raw path
        - (remat.raw_bytes(feed.buckets, feed.encodes_clips) if vae else 0),
        config.cuda_graph_tokens if device.type == "cuda" else 0,
        attention_name,
        config.activation_offload,
    )
    micro_step = MicroStep(
        model,
        adapters.set_seeds,
        attention,
        remat.block_runner(model, plans),
        scaler,
        1 / (num_micro * world.size),
        config.cuda_graph_tokens,
    )

    first_step = 0
    if newest is not None:
        state = checkpoint.load(newest, flat(config), resumable_changes(config))
        first_step = state["step"]
        if first_step > config.num_steps:
            raise ValueError(
                f"num_steps = {config.num_steps}: {newest} is {first_step} steps on already; ask for as "
                f"many or more, or choose another output"
            )
        flat_parameters.vector.data.copy_(state["parameters"])
        adapters.refresh()
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        feed.load_state_dict(state["feed"])
    # rank 0 may delete and write checkpoints only after everyone has read theirs
    dist.barrier(world)
    metrics = (
        stack.enter_context(Metrics(output, first_step, config.num_steps))
        if world.rank == 0
        else None
    )
    if metrics:
        (output / "config.toml").write_text(dump_toml(config), encoding="utf-8")
        metrics.say(
            f"{len(adapters.tensors())} adapters, {flat_parameters.vector.numel():,} parameters on "
            f"{world.size} x {device.type}; {config.model.dtype}, {attention_name} attention, "
            f"activation_memory = {config.activation_memory}; "
            + (f"resumed from {newest}" if newest else "from the start")
        )
        for bucket, shape in shapes.items():
            metrics.say(f"{bucket}: {remat.describe(model.config, plans[shape])}")

    stopwatch, logged_step, num_tokens = Stopwatch(device), first_step, 0
    reports: deque[Report] = deque()
    for step in range(first_step, config.num_steps):
        flat_parameters.buffer.zero_()
        for _ in range(num_micro):
            batch, feed_state = next(feed)
            stopwatch.lap("data_wait_s")
            loss = micro_step.forward(prepare(batch, config.flow))
            flat_parameters.loss.add_(loss / (num_micro * world.size))
            stopwatch.lap("forward_s")
            micro_step.backward()
            stopwatch.lap("backward_s")
            num_tokens += WAN22.num_tokens(batch.bucket) * len(batch.keys) * world.size
        dist.all_reduce_sum(flat_parameters.buffer, world)
        stopwatch.lap("sync_s")
        lr = optim.learning_rate(
            step,
            config.optim.lr,
            config.optim.schedule,
            config.optim.warmup_steps,
            config.num_steps,
        )
        optimizer.param_groups[0]["lr"] = lr
        scaler.unscale_(optimizer)
        grad_norm = optim.clip_gradient(flat_parameters.gradient, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        adapters.refresh()
        stopwatch.lap("optimizer_s")

        done = step + 1
        save = done % config.checkpoint_every == 0 or done == config.num_steps
        if save or done % config.log_every == 0:
            scale = scaler.scale(torch.ones((), device=device))
            scalars = Scalars(flat_parameters.loss, grad_norm, scale)
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
                scaler.is_enabled(),
            ):
                # the same on all ranks; nothing of this is saved
                raise ValueError(
                    f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}, "
                    f"loss scale {record['loss_scale']}. Start a new output with a lower optim.lr, from "
                    f"lora.init = the {lora.DIFFUSERS_FILE} in "
                    f"{checkpoint.latest(output) or 'an earlier run'}"
                )
            if metrics:
                metrics.write(record)
        if metrics and save:
            checkpoint.save(
                output,
                done,
                {
                    "step": done,
                    "config": flat(config),
                    "parameters": flat_parameters.vector.detach(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "feed": feed_state,
                },
                lambda folder: lora.save_both(adapters, folder),
                config.keep_checkpoints,
            )
        stopwatch.lap("other_s")
    dist.barrier(world)
    if metrics:
        lora.save_both(adapters, output)
        metrics.say(
            f"{config.num_steps} steps done: {output / lora.DIFFUSERS_FILE} (diffusers), "
            f"{output / lora.COMFYUI_FILE} (ComfyUI)"
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
                stack.enter_context(dist.process_group()),
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
