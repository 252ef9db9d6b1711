"""Fine-tune Wan2.2 with LoRA on a dataset of shardgen.

    torchrun --nproc-per-node 2 train/main.py CONFIG.toml [--set key=value ...]

The whole program is on this page: build, loop, save. A run whose output folder has checkpoints
goes on from the newest one, exactly (on a GPU bit for bit with `deterministic`). Nothing random
comes from a global generator: what happens to a sample follows from its seed.
"""

import argparse
import logging
import os
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # torchrun puts train/ there, not the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from loader.config import dump_toml, load_toml
from loader.files import sole_writer, told, write_atomic
from train import checkpoint, optim, setup, watch
from train.cards import NOT_MEASURED, CardReader
from train.config import TrainConfig, in_steps
from train.evaluation import BEST_FOLDER, Evaluation
from train.lora import files as lora_files
from train.model.attention import describe
from train.parallel import mesh
from train.parallel.beats import with_output
from train.progress import Progress, Report
from train.reports import Reports
from train.signals import Signals, Stopped, Wish
from train.status import Status, interruptible
from train.step import prepare
from train.stopwatch import RunAhead, Stopwatch, peak_memory_gib
from train.tally import add_losses
from train.tracking import open_tracker

log = logging.getLogger("train")


def train(config: TrainConfig, world: mesh.World, stack: ExitStack) -> None:
    # -- one run in a folder, known to all before anything is written there ------------------
    output = config.output_dir
    if world.is_main:
        me = f"a run (process {os.getpid()} on {socket.gethostname()})"
        stack.enter_context(sole_writer(output, me))
        watch.clear(output)
        checkpoint.bring_back(output)
    world = with_output(world, output / watch.FOLDER)
    status = stack.enter_context(Status(output, world, config.num_steps))

    # -- build and resume --------------------------------------------------------------------
    feed = stack.enter_context(setup.open_feed(config, world))
    config = in_steps(config, feed.num_batches_per_epoch)
    setup.check_goes_on(config, world)
    run = setup.build(config, world, feed.buckets, feed_bytes=setup.feed_bytes(config, feed))
    evaluation = Evaluation(run, stack)
    resumed = run.resume(feed)
    evaluation.resume(resumed)
    first_step = resumed.num_done
    # the main process may delete and write checkpoints only after everyone has read theirs
    mesh.barrier(world)
    # before what only the main process does, such as opening a tracker, which may take a while
    watched = stack.enter_context(watch.Watch(output, world, config.watch, status.failed_at_once))
    progress = None
    if world.is_main:
        checkpoint.set_aside_after(output, first_step)
        progress = stack.enter_context(
            Progress(
                output,
                first_step,
                config.num_steps,
                is_evaluated=resumed.is_evaluated,
                tracker=open_tracker(config.wandb, output, run.name, run.shared_config()),
            )
        )
        # what was chosen of "auto" follows as comments
        chosen = "".join(f"# {line}\n" for line in describe(run.kernels))
        write_atomic(output / "config.toml", (dump_toml(run.config) + chosen).encode())
        for line in run.describe():
            progress.say(line)
    status.num_steps = config.num_steps
    status.running(first_step)
    signals = stack.enter_context(Signals(status.stopped_at_once))
    evaluate = partial(
        evaluation.evaluate, progress=progress, signals=signals, status=status, watch=watched
    )
    if not evaluation.is_complete(first_step, resumed.is_evaluated):
        # the base before the first step, or what a signal has cut short
        evaluate(first_step, feed.state_dict(), is_validated=resumed.is_evaluated)

    # names for what the loop uses most
    flat, scaler, optimizer, micro_step = run.flat, run.scaler, run.optimizer, run.micro_step
    share = config.global_batch // world.data_size
    stopwatch, run_ahead = Stopwatch(world.device), RunAhead(world.device)
    card = CardReader.open(world.device) if world.is_main else None
    num_tokens, logged_step = 0, first_step
    # where the feed stood after the last finished step
    resume_feed = feed.state_dict()
    reports = Reports(run, feed, progress, status, watched)
    done = first_step
    for step in range(first_step, config.num_steps):
        if evaluation.stops:
            break
        # -- one optimizer step: forward and backward of this process's micro-batches --------
        flat.buffer.zero_()
        num_samples = 0
        while num_samples < share:
            # a signal counts at the same micro-batch on all processes
            watched.mark("waits for the other processes")
            wish = signals.agreed(world)
            if wish != Wish.NONE:
                reports.read_all()
                if step > first_step:
                    with watched.busy("writes a checkpoint"):
                        run.save_checkpoint(step, resume_feed, *evaluation.of_checkpoint())
                # further than the log, if not every step is logged
                status.running(step)
                if wish == Wish.STOP:
                    raise signals.stopped(step)
            stopwatch.lap("sync_s")
            watched.mark("waits for a batch")
            batch, feed_state = next(feed)
            num_samples += len(batch.keys)
            watched.start_micro_batch(step, batch.keys)
            stopwatch.lap("data_wait_s")
            losses_B = micro_step.forward(prepare(batch, run.laws))
            add_losses(flat, losses_B, batch, config.global_batch, world.sequence_rank)
            stopwatch.lap("forward_s")
            micro_step.backward()
            stopwatch.lap("backward_s")
            run_ahead.wait()
            watched.end_micro_batch()
            num_tokens += (
                run.kind.layout.num_tokens(batch.bucket) * len(batch.keys) * world.data_size
            )
        # gradient and losses of all processes, summed as one vector
        watched.mark("sums the gradient with the other processes")
        mesh.all_reduce_sum(flat.buffer, world)
        stopwatch.lap("sync_s")
        # clip, step, and renew the copies of the adapters that GEMMs read
        lr = optim.learning_rate(step, config.num_steps, config.optim)
        optim.set_learning_rate(optimizer, lr, config.optim)
        scaler.unscale_(optimizer)
        grad_norm = optim.clip_gradient(flat.gradient, config.optim.clip_norm)
        # leaves the step out where the gradient is not finite
        scaler.step(optimizer)
        optim.update_scale(scaler, run.scales_loss)
        run.adapters.refresh()
        if run.average:
            run.average.update(flat.vector, step + 1)
        run.tally.step(flat, grad_norm, run.loss_scale(), batch.index)
        resume_feed = feed_state
        stopwatch.lap("optimizer_s")

        done = step + 1
        evaluates = evaluation.validates(done) or evaluation.samples(done)
        saves = evaluates or run.is_due(done, config.checkpoint.every)
        # -- once in a while: log ------------------------------------------------------------
        if saves or done % config.log_every == 0:
            report = Report(
                step=done,
                num_steps=done - logged_step,
                num_tokens=num_tokens,
                laps=stopwatch.split(),
                scalars=run.tally.read_later(),
                epoch=batch.index // feed.num_batches_per_epoch,
                lr=lr,
                memory_gib=peak_memory_gib(world.device),
                card=card.read() if card else NOT_MEASURED,
            )
            reports.append(report)
            num_tokens, logged_step = 0, done
        # -- once in a while: checkpoint -----------------------------------------------------
        if saves:
            reports.read_all()
            with watched.busy("writes a checkpoint"):
                run.save_checkpoint(
                    done, resume_feed, *evaluation.of_checkpoint(), is_evaluated=not evaluates
                )
        # -- once in a while: validate, and make a few clips ---------------------------------
        if evaluates:
            evaluate(done, resume_feed)
        stopwatch.lap("other_s")

    mesh.barrier(world)
    if progress:
        with run.exported():
            lora_files.save_both(run.adapters, output, config.model.expert)
        diffusers, comfyui = lora_files.result_files(config.model.expert)
        progress.say(
            f"{done} steps done: {output / diffusers} (diffusers), {output / comfyui} (ComfyUI)"
        )
        best_step = next(iter(evaluation.best_steps), None)
        status.ends("done", "", best_step)
        if evaluation.stops:
            reason = (
                f"{config.early_stop.patience} validations without an improvement beyond its "
                f"error; the best was step {best_step}, whose LoRA is in {output / BEST_FOLDER}"
            )
            progress.say(f"stopped early: {reason}")
            status.ends("early_stop", reason, best_step)


@record
def run(config_path: Path, overrides: list[str]) -> None:
    """What it raises, torchrun repeats in its last block."""
    with ExitStack() as stack:
        config = load_toml(config_path, TrainConfig, overrides)
        world = stack.enter_context(mesh.process_group(config.parallel.sequence))
        train(config, world, stack)


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
    logging.captureWarnings(True)
    # the samples that each epoch leaves out, the LoRA that a run starts from
    for name in ("loader", "train.run"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        with interruptible():
            run(arguments.config, arguments.set)
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"train: {error}\n"
            f'train: the GPU\'s memory is full. Set activation_memory to "block" or a smaller '
            f"budget than it chose, activation_offload = true, cuda_graph_tokens = 0, "
            f"micro_batch = 1, or build smaller windows.buckets"
        )
    except (ValueError, OSError) as error:
        # every fault of the user's is one of these, and says what to do
        sys.exit(f"train: {told(error)}")
    except (Stopped, mesh.PeerLostError) as error:
        print(f"train: {error}", file=sys.stderr)
        sys.exit(128 + error.number if isinstance(error, Stopped) else 1)


if __name__ == "__main__":
    mesh.run_program(main)
