"""How fast a training step is, against diffusers + PEFT and against the floor: `python -m
bench.step --profile native`.

One process per profile and shape: random weights of the real size, subjects interleaved, CUDA
events, a whole optimizer step each. First it checks that what it times is right
(bench/step_check.py, bench/step_check_training.py); then it prints a table and writes it as JSON.
Profiles:

- native: bfloat16, the card's best attention, nothing recomputed (diffusers: torch's best, cuDNN);
- native32: the same, our activations planned for 30 GiB, some steps of it under a cap of 32
  before the timed rounds;
- volta: float16 with loss scaling, SDPA's memory-efficient kernel alone, planned and capped the
  same, and none of the low-rank kernels that need tl.dot: what runs on a V100.

Cases: t2v and i2v with rank 16 on the six q/k/v, r32 with rank 32 on every layer and dropout 0.1
(t2v). Peak memory is the step's own: what the other subjects keep is subtracted.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

import msgspec
import torch

from bench import step_check_training
from bench import step_subjects as subjects
from bench.our_step import ADAPTERS, Adapters, our_config, our_run
from loader.shape import WAN22, Bucket
from tools import plan
from tools.fake.step import random_batch
from train.activations import plan as remat
from train.model.attention import AttentionName
from train.model.wan import TI2V_5B, WanConfig

GIB = 2**30
CAP_GIB, PLANNED_GIB = 32, 30
GRAPH_TOKENS = 4096
PROFILES: dict[str, tuple[torch.dtype, AttentionName, bool]] = {
    "native": (torch.bfloat16, "auto", False),
    "native32": (torch.bfloat16, "auto", True),
    "volta": (torch.float16, "efficient", True),
}
# without the low-rank kernels that need tensor cores
NO_TENSOR_CORES = ("volta",)
CASES = {"t2v": ("r16", False), "i2v": ("r16", True), "r32": ("r32", False)}
PEERS = ("eager, checkpointing", "compiled, checkpointing", "compiled")


class Bench:
    """The models of one adapter configuration, and the steps to time with them."""

    def __init__(
        self,
        config: WanConfig,
        bucket: Bucket,
        profile: str,
        adapters: Adapters,
        peers: list[str],
        device: torch.device,
    ):
        self.config, self.bucket, self.device = config, bucket, device
        self.dtype, name, self.capped = PROFILES[profile]
        subjects.only_attention("efficient" if name == "efficient" else "cudnn")
        self.resident: dict[str, int] = {}
        self.steps: dict[str, subjects.Step] = {}
        with self._counting("peer"):
            self.reference = subjects.reference_model(config, device, self.dtype)
        before = torch.cuda.memory_allocated()
        with self._counting("ours"):
            self.run = our_run(
                our_config(
                    adapters,
                    self.dtype,
                    name,
                    activation_memory="auto" if self.capped else "all",
                    activation_offload=self.capped,
                    cuda_graph_tokens=GRAPH_TOKENS,
                ),
                bucket,
                model=subjects.our_model(self.reference, config, self.dtype),
                tensor_cores=profile not in NO_TENSOR_CORES,
                # as on a card of its own, whatever the other subjects have taken
                free_bytes=lambda _: PLANNED_GIB * GIB - torch.cuda.memory_allocated() + before,
            )
            self.steps["ours"] = subjects.our_step(self.run)
        with self._counting("frozen"):
            frozen = subjects.our_model(self.reference, config, self.dtype)
        self.plan, attention = self.run.plans[bucket], self.run.attention
        self.steps["frozen"] = subjects.frozen_step(
            frozen, attention, bucket, self.plan, GRAPH_TOKENS
        )
        self.steps["floor"] = self.floor()
        with self._counting("peer"):
            step = subjects.peer_step(self.reference, adapters, self.dtype) if peers else None
        compiled = (
            subjects.compile_blocks(self.reference)
            if any("compiled" in peer for peer in peers)
            else None
        )
        for peer in peers:
            assert step is not None
            self.steps[peer] = self._peer(
                step, compiled if "compiled" in peer else None, "checkpointing" in peer
            )

    def floor(self) -> subjects.Step:
        return subjects.floor_step(self.run.model, self.bucket, self.dtype, self.run.attention)

    def _peer(self, step: subjects.Step, compiled: Any, checkpointing: bool) -> subjects.Step:
        def run(batch: Any) -> torch.Tensor:
            subjects.use_compiled(self.reference, compiled)
            self.reference.gradient_checkpointing = checkpointing
            return step(batch)

        if checkpointing:
            self.reference.enable_gradient_checkpointing()
        return run

    def _counting(self, owner: str) -> Any:
        return _Counting(self.resident, owner)

    def time(self, name: str, batch: Any) -> dict[str, float]:
        """One step: seconds, loss, peak GiB of its own."""
        owner = "peer" if name in PEERS else "ours" if name == "ours" else "frozen"
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.resident[owner]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = self.steps[name](batch)
        end.record()
        torch.cuda.synchronize()
        return {
            "s": start.elapsed_time(end) / 1e3,
            "loss": loss.item(),
            "peak_gib": (torch.cuda.max_memory_allocated() - others) / GIB,
        }

    def under_the_cap(self, batch: Any) -> dict[str, float]:
        """Our step with no more memory for it than a card of 32 GiB has: seconds, and how often
        in a step the allocator had to give back what it held and try again. Out of memory ends
        the run.
        """
        torch.cuda.empty_cache()
        others = torch.cuda.memory_reserved() - self.resident["ours"]
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (CAP_GIB * GIB - plan.CONTEXT_BYTES + others) / total
        )
        self.time("ours", batch)
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        capped_s = min(self.time("ours", batch)["s"] for _ in range(3))
        retries = torch.cuda.memory_stats()["num_alloc_retries"] - retries
        torch.cuda.set_per_process_memory_fraction(1.0)
        return {"capped_s": capped_s, "capped_retries": retries / 3}


class _Counting:
    """Adds what is allocated inside it to `resident[owner]`."""

    def __init__(self, resident: dict[str, int], owner: str):
        self._resident, self._owner = resident, owner

    def __enter__(self) -> None:
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *_: object) -> None:
        grown = torch.cuda.memory_allocated() - self._before
        self._resident[self._owner] = self._resident.get(self._owner, 0) + grown


def rows_of(
    bench: Bench, case: str, i2v: bool, num_rounds: int, deadline_s: float
) -> list[dict[str, Any]]:
    """Interleave all subjects and return a row for each."""
    batch = random_batch(bench.bucket, bench.device, is_i2v=[i2v])
    small = WAN22.num_tokens(bench.bucket) <= 4096
    if small:
        bench.steps["floor"] = subjects.graphed(bench.floor(), batch)
    peaks_gib = {}  # of the warm-up too: what a replayed graph uses is not counted as allocated
    for name in bench.steps:
        begin_s = time.perf_counter()
        # compile, capture
        peaks_gib[name] = max(bench.time(name, batch)["peak_gib"] for _ in range(3 if small else 2))
        print(
            f"  {case}: {name}: warmed up in {time.perf_counter() - begin_s:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    capped = bench.under_the_cap(batch) if bench.capped else {}
    if capped:
        print(
            f"  {case}: ours under the cap: {capped['capped_s']:.4f} s, {capped['capped_retries']:.1f} retries",
            file=sys.stderr,
            flush=True,
        )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in bench.steps}
    order = random.Random(0)
    for number in range(num_rounds):
        # one round in any case, so that there is a table
        if number and time.perf_counter() > deadline_s:
            break
        # what ran before shows in the card's clock
        for name in order.sample(list(bench.steps), len(bench.steps)):
            runs[name].append(bench.time(name, batch))
    adapters = ADAPTERS[CASES[case][0]]
    step = plan.step_of(
        bench.config,
        bench.bucket,
        list(adapters.targets),
        adapters.rank,
        2,
        remat.ShapePlan(None, 0.0),
    )
    median = {name: statistics.median(run["s"] for run in found) for name, found in runs.items()}
    return [
        {
            "case": case,
            "subject": name,
            "n": len(found),
            "s": median[name],
            "min_s": min(r["s"] for r in found),
            "max_s": max(r["s"] for r in found),
            "tokens_per_s": WAN22.num_tokens(bench.bucket) / median[name],
            "model_tflops": (step.gemm_flops + step.attention_flops) / median[name] / 1e12,
            "of_floor": median[name] / median["floor"],
            "loss": found[-1]["loss"],
            "peak_gib": max(peaks_gib[name], *(r["peak_gib"] for r in found)),
            **(capped if name == "ours" else {}),
        }
        for name, found in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="native")
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument("--cases", default="t2v,i2v,r32")
    parser.add_argument("--peers", default=";".join(PEERS), help="of " + "; ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budget-s", type=float, default=500.0, help="after so many, a case has one round"
    )
    parser.add_argument("--layers", type=int, default=TI2V_5B.num_layers)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases, peers = (
        arguments.cases.split(","),
        [peer.strip() for peer in arguments.peers.split(";") if peer.strip()],
    )
    if unknown := {*cases} - CASES.keys() | {*peers} - {*PEERS}:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}, peers {'; '.join(PEERS)}"
        )
    begin_s, device, bucket = (
        time.perf_counter(),
        torch.device("cuda"),
        WAN22.parse(arguments.shape),
    )
    config = msgspec.structs.replace(TI2V_5B, num_layers=arguments.layers)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    result: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "commit": commit,
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))

    if not arguments.no_check:
        dtype, attention, _ = PROFILES[arguments.profile]
        result["checks"] = step_check_training.check(
            config,
            bucket,
            dtype,
            attention,
            CASES,
            device,
            tensor_cores=arguments.profile not in NO_TENSOR_CORES,
        )
        for name, found in result["checks"].items():
            print(
                f"check: {name}: "
                + ", ".join(
                    f"{key} {value:.2g} (at most {limit:g})"
                    for key, (value, limit) in found.items()
                ),
                flush=True,
            )
        save()
        if any(
            not value <= limit
            for found in result["checks"].values()
            for value, limit in found.values()
        ):
            sys.exit("a check failed: nothing was timed")
        step_check_training.free_memory()
    for adapters in dict.fromkeys(CASES[case][0] for case in cases):
        bench = Bench(config, bucket, arguments.profile, ADAPTERS[adapters], peers, device)
        print(
            f"{adapters}: ours: {remat.describe(config, bench.plan)}; beside a model of "
            f"{bench.resident['ours'] / GIB:.2f} GiB",
            flush=True,
        )
        for case in (case for case in cases if CASES[case][0] == adapters):
            result["rows"] += rows_of(
                bench, case, CASES[case][1], arguments.rounds, begin_s + arguments.budget_s
            )
            save()
        del bench
        step_check_training.free_memory()
    print(f"{result['card']}, {arguments.profile}, {arguments.shape}, {arguments.layers} blocks")
    print(
        "| case | subject | n | s/step (least to most) | tokens/s | TFLOP/s | of the floor | peak GiB | loss |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        print(
            f"| {row['case']} | {row['subject']} | {row['n']} | {row['s']:.4f} ({row['min_s']:.4f} to "
            f"{row['max_s']:.4f}) | {row['tokens_per_s']:,.0f} | {row['model_tflops']:.0f} | {row['of_floor']:.3f} | "
            f"{row['peak_gib']:.1f} | {row['loss']:.4f} |"
        )
    print(f"took {time.perf_counter() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
