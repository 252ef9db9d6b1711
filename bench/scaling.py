"""Two GPUs against one: `torchrun --nproc-per-node 2 -m bench.scaling [--json FILE]`, also with
NCCL_P2P_DISABLE=1.

The trainer's step at the real size with random weights: each rank alone and all ranks together
take turns, with 1 and 8 micro-batches accumulated. Two cards of one kind differ, and the slower
one sets the pace: so `speed`, the rate against rank 0 alone, stands beside that against the
slower card. First the reduced gradient is compared with the sum of every rank's own.
"""

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

from loader.sample import MAX_TEXT_TOKENS
from loader.shape import WAN22, Bucket
from tools.profile_step import random_batch, random_transformer
from train import optim
from train.activations import plan as remat
from train.config import FlowConfig, LoRAConfig
from train.lora import adapters as lora
from train.model.attention import choose_attention
from train.model.wan import TI2V_5B
from train.parallel import mesh as dist
from train.step import MicroStep, prepare


class Run:
    def __init__(self, bucket: Bucket, dtype: torch.dtype, world: dist.World):
        self.world, self.bucket, settings = world, bucket, LoRAConfig()
        model = random_transformer(TI2V_5B, world.device, dtype)
        self.adapters = lora.attach(
            model, settings.targets, settings.rank, settings.alpha, 0.0, seed=1
        )
        for _, b in self.adapters.tensors().values():
            b.normal_(std=0.02)
        self.adapters.refresh()
        self.flat = optim.flatten(self.adapters.parameters())
        self.optimizer = optim.make_optimizer(
            self.flat.vector, "adamw", 1e-6, (0.9, 0.999), 1e-8, 0.01
        )
        self.attention_name, attention = choose_attention("auto", world.device, dtype)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        shape = remat.Shape(1, WAN22.num_tokens(bucket), MAX_TEXT_TOKENS)
        kept = remat.plan_shape(TI2V_5B, shape, settings.targets, dtype.itemsize, float("inf"))
        self.micro = MicroStep(
            model,
            self.adapters.set_seeds,
            attention,
            remat.block_runner(model, {shape: kept}),
            scaler,
            1.0,
            4096,
        )
        self.batch = replace(
            random_batch(bucket, 1, TI2V_5B.text_dim, world.device), seeds=[world.rank]
        )

    def gradient(self, num_micro: int) -> None:
        self.flat.buffer.zero_()
        for _ in range(num_micro):
            self.micro.forward(prepare(self.batch, FlowConfig()))
            self.micro.backward()

    def step_s(self, num_micro: int, together: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.gradient(num_micro)
        if together:
            dist.all_reduce_sum(self.flat.buffer, self.world)
        optim.clip_gradient(self.flat.gradient, 1.0)
        self.optimizer.step()
        self.adapters.refresh()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def reduced_gradient_error(self) -> float:
        """Largest difference of the reduced gradient from the sum of all ranks' own, relative to
        its largest value.
        """
        self.gradient(1)
        own = [torch.empty_like(self.flat.gradient) for _ in range(self.world.size)]
        torch.distributed.all_gather(own, self.flat.gradient.clone())
        assert not torch.equal(own[0], own[1]), "the ranks must see other samples"
        dist.all_reduce_sum(self.flat.buffer, self.world)
        expected = torch.stack(own).sum(0)
        return ((self.flat.gradient - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument(
        "--rounds", default="1=10,8=3", help="accumulated micro-batches = rounds, ..."
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with dist.process_group() as world:
        if world.size < 2:
            raise SystemExit(
                "one process has nothing to compare with: torchrun --nproc-per-node 2 -m bench.scaling"
            )
        run = Run(WAN22.parse(arguments.shape), torch.bfloat16, world)
        error = run.reduced_gradient_error()
        assert error < 1e-5, f"the reduced gradient is off by {error}"
        for _ in range(2):
            run.step_s(1, together=True)
        result: dict[str, object] = {
            "card": torch.cuda.get_device_name(),
            "processes": world.size,
            "shape": arguments.shape,
            "attention": run.attention_name,
            "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
            "reduced_gradient_error": error,
            "reduced_bytes": run.flat.buffer.nbytes,
        }
        for num_micro, rounds in (
            map(int, pair.split("=")) for pair in arguments.rounds.split(",")
        ):
            alone, together = [], []
            for _ in range(rounds):
                for rank in range(world.size):
                    if world.rank == rank:
                        alone.append(run.step_s(num_micro, together=False))
                    dist.barrier(world)
                together.append(run.step_s(num_micro, together=True))
                dist.barrier(world)
            everyone: list[list[float]] = [[] for _ in range(world.size)]
            torch.distributed.all_gather_object(everyone, alone)
            if world.rank == 0:
                slower = [max(seconds) for seconds in zip(*everyone, strict=True)]
                for name, base in (("", alone), (", the slower card", slower)):
                    ratios = [world.size * a / b for a, b in zip(base, together, strict=True)]
                    result[f"accumulation {num_micro}{name}"] = {
                        "n": rounds,
                        "alone_s": statistics.median(base),
                        "together_s": statistics.median(together),
                        "speed": statistics.median(ratios),
                        "least": min(ratios),
                        "most": max(ratios),
                    }
        if world.rank == 0:
            print(json.dumps(result, indent=1))
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
