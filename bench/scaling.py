"""Two GPUs against one: `torchrun --nproc-per-node 2 -m bench.scaling [--json FILE]`, also with
NCCL_P2P_DISABLE=1. One sample on several GPUs: bench/sequence.py.

The trainer's step at the real size with random weights: each rank alone and all ranks together
take turns, with 1 and 8 micro-batches accumulated. Two cards of one kind differ, and the slower
one sets the pace: so `speed`, the rate against rank 0 alone, stands beside that against the
slower card. First the reduced gradient is compared with the sum of every rank's own. Each round is
printed, and stands in the JSON file, before the next one.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
import torch.distributed

from bench.our_step import ADAPTERS, add_gradients, our_config, our_run, update
from bench.results import check_start, save
from loader.shape import WAN22, Bucket
from tools.fake.step import random_batch, random_transformer
from train.model.wan import TI2V_5B
from train.parallel import mesh


class Steps:
    """The trainer's step on this rank, alone or together with the others."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, world: mesh.World):
        self.world = world
        config = our_config(ADAPTERS["r16"], dtype, "auto", global_batch=world.data_size)
        model = random_transformer(TI2V_5B, world.device, dtype)
        self.run = our_run(config, bucket, model, world)
        # another sample on each rank
        self.batch = random_batch(bucket, world.device, is_i2v=[False], seed=world.data_rank)

    def gradient(self, num_micro: int) -> None:
        add_gradients(self.run, [self.batch] * num_micro)

    def step_s(self, num_micro: int, together: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.gradient(num_micro)
        if together:
            mesh.all_reduce_sum(self.run.flat.buffer, self.world)
        update(self.run)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def reduced_gradient_error(self) -> float:
        """Largest difference of the reduced gradient from the sum of all ranks' own, relative to
        its largest value.
        """
        self.gradient(1)
        flat = self.run.flat
        own = [torch.empty_like(flat.gradient) for _ in range(self.world.data_size)]
        torch.distributed.all_gather(own, flat.gradient.clone())
        assert not torch.equal(own[0], own[1]), "the ranks must see other samples"
        mesh.all_reduce_sum(flat.buffer, self.world)
        expected = torch.stack(own).sum(0)
        return ((flat.gradient - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument(
        "--rounds", default="1=10,8=5", help="accumulated micro-batches = rounds, ..."
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        bucket = WAN22.parse(arguments.shape)
        rounds_of = [tuple(map(int, pair.split("="))) for pair in arguments.rounds.split(",")]
    except ValueError as problem:
        parser.error(str(problem))
    check_start("bench.scaling", arguments.json)
    with mesh.process_group() as world:
        if world.data_size < 2:
            raise SystemExit(
                "one process has nothing to compare with: "
                "torchrun --nproc-per-node 2 -m bench.scaling"
            )
        steps = Steps(bucket, torch.bfloat16, world)
        error = steps.reduced_gradient_error()
        assert error < 1e-5, f"the reduced gradient is off by {error}"
        for _ in range(2):
            steps.step_s(1, together=True)
        result: dict[str, object] = {
            "card": torch.cuda.get_device_name(),
            "processes": world.data_size,
            "shape": arguments.shape,
            "attention": steps.run.kernels.names,
            "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
            "reduced_gradient_error": error,
            "reduced_bytes": steps.run.flat.buffer.nbytes,
        }
        if world.is_main:
            print(json.dumps(result, indent=1), flush=True)
            save(arguments.json, result)
        for num_micro, rounds in rounds_of:
            alone: list[float] = []
            together: list[float] = []
            for _ in range(rounds):
                for rank in range(world.data_size):
                    if world.data_rank == rank:
                        alone.append(steps.step_s(num_micro, together=False))
                    mesh.barrier(world)
                together.append(steps.step_s(num_micro, together=True))
                everyone = mesh.gather(alone, world)
                if world.is_main:
                    found = speeds(everyone, together)
                    result |= {f"accumulation {num_micro}{who}": row for who, row in found.items()}
                    print(f"accumulation {num_micro}: {json.dumps(found)}", flush=True)
                    save(arguments.json, result)


def speeds(alone: list[list[float]], together: list[float]) -> dict[str, dict[str, float]]:
    """Of all ranks together against rank 0, and against the slower card of each round; `alone`:
    seconds of every rank's rounds.
    """
    slower = [max(seconds) for seconds in zip(*alone, strict=True)]
    found = {}
    for who, base in (("", alone[0]), (", the slower card", slower)):
        ratios = [len(alone) * a / b for a, b in zip(base, together, strict=True)]
        found[who] = {
            "n": len(together),
            "alone_s": statistics.median(base),
            "together_s": statistics.median(together),
            "speed": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    return found


if __name__ == "__main__":
    main()
