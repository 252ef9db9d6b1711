"""How fast a training step is, against diffusers + PEFT and against the floor: `python -m
bench.step --profile native`.

One process per profile and shape: random weights of the real size, subjects interleaved, CUDA
events, a whole optimizer step each. First it checks that what it times is right
(bench/step_check.py, bench/step_check_training.py). Then each round is printed and stands in the
JSON file at once; a table comes at the end. Profiles:

- native: bfloat16, the card's best attention, nothing recomputed (diffusers: torch's best, cuDNN);
- native32: the same, our activations planned for 30 GiB, some steps of it under a cap of 32
  before the timed rounds;
- volta: float16 with loss scaling, attention from GEMMs or SDPA's memory-efficient kernel, the
  faster one (peers: the latter), planned and capped the same, and none of the low-rank kernels
  that need tl.dot: what runs on a V100.

Models: TI2V-5B, or with --model another one, whose checks are those of the tests alone.
Cases: t2v and i2v with rank 16 on the six q/k/v, r32 with rank 32 on every layer and dropout 0.1
(t2v). Peak memory is the step's own: what the other subjects keep is subtracted. A step is one
micro-batch of --samples samples.
"""

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

import msgspec
import torch

from bench import step_check_training
from bench import step_subjects as subjects
from bench.our_step import ADAPTERS, MODELS, Adapters
from bench.results import check_start, save
from bench.step_check import Checks
from bench.step_timing import (
    CAP_GIB,
    DEFAULT_SUBJECTS,
    GRAPH_TOKENS,
    PROFILES,
    SUBJECTS,
    Subjects,
    Timing,
)
from loader.shape import Bucket
from tools.budget import CONTEXT_BYTES, GIB, budget
from tools.cards import CARDS
from tools.counts import step_of
from tools.fake.step import random_batch
from tools.table import table
from train.activations.plan import ShapePlan, describe
from train.config import TrainConfig
from train.model.attention import describe as describe_kernels
from train.model.wan import WanConfig

# name -> (of ADAPTERS, whether image-to-video)
CASES = {"t2v": ("r16", False), "i2v": ("r16", True), "r32": ("r32", False)}
Row = dict[str, Any]  # as it stands in the JSON file


def say(text: str) -> None:
    """Progress, beside the table."""
    print(f"  {text}", file=sys.stderr, flush=True)


def rows_of(bench: Subjects, case: str, num_rounds: int, deadline_s: float) -> Iterator[list[Row]]:
    """Interleave all subjects; after each round a row for each, of all rounds so far. After
    `deadline_s` no round begins, but for the first.
    """
    adapters_name, is_i2v = CASES[case]
    if bench.kind.i2v_share is not None:
        is_i2v = bench.kind.i2v_share > 0
    batch = random_batch(
        bench.bucket, bench.device, is_i2v=[is_i2v] * bench.shape.batch, kind=bench.kind
    )
    small = bench.shape.batch * bench.shape.num_tokens <= GRAPH_TOKENS
    if small and "floor" in bench.steps:
        bench.steps["floor"] = subjects.graphed(bench.floor(), batch)

    peaks_gib = {}  # of the warm-up too: what a replayed graph uses is not counted as allocated
    for name in bench.steps:
        begin_s = time.perf_counter()
        # compile, capture
        peaks_gib[name] = max(bench.time(name, batch).peak_gib for _ in range(3 if small else 2))
        say(f"{case}: {name}: warmed up in {time.perf_counter() - begin_s:.1f} s")
    capped = {}
    if bench.profile.capped and "ours" in bench.steps:
        capped = bench.under_the_cap(batch)
    if capped:
        say(
            f"{case}: ours under the cap: {capped['capped_s']:.4f} s, "
            f"{capped['capped_retries']:.1f} retries"
        )

    model_flops = step_flops(bench, ADAPTERS[adapters_name])
    runs: dict[str, list[Timing]] = {name: [] for name in bench.steps}
    order = random.Random(0)
    for number in range(num_rounds):
        if number and time.perf_counter() > deadline_s:
            break
        # what ran before shows in the card's clock
        for name in order.sample(list(bench.steps), len(bench.steps)):
            runs[name].append(bench.time(name, batch))
        took = ", ".join(f"{name} {found[-1].seconds:.4f} s" for name, found in runs.items())
        say(f"{case}: round {number + 1}: {took}")
        floor = [run.seconds for run in runs.get("floor", [])]
        floor_s = statistics.median(floor) if floor else math.nan
        rows = []
        for name, found in runs.items():
            row: Row = {"case": case, "subject": name}
            row |= row_of(bench, found, model_flops, floor_s)
            row["peak_gib"] = max(row["peak_gib"], peaks_gib[name])
            rows.append(row | (capped if name == "ours" else {}))
        yield rows


def step_flops(bench: Subjects, adapters: Adapters) -> float:
    """Operations that the model takes in a step, whatever is recomputed."""
    step = step_of(
        bench.config,
        bench.shape.num_tokens,
        list(adapters.targets),
        adapters.rank,
        dtype_bytes=2,
        activations=ShapePlan(saved=None, num_bytes=0.0),
    )
    return bench.shape.batch * (step.gemm_flops + sum(step.attention_flops.values()))


def row_of(bench: Subjects, found: list[Timing], model_flops: float, floor_s: float) -> Row:
    """Of one subject's rounds."""
    seconds = [run.seconds for run in found]
    median_s = statistics.median(seconds)
    return {
        "n": len(found),
        "samples": bench.shape.batch,
        "s": median_s,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "seconds": seconds,
        "tokens_per_s": bench.shape.batch * bench.shape.num_tokens / median_s,
        "model_tflops": model_flops / median_s / 1e12,
        "of_floor": median_s / floor_s,
        "loss": found[-1].loss,
        "peak_gib": max(run.peak_gib for run in found),
    }


def print_checks(checks: dict[str, Checks]) -> None:
    """Every check; ends the program if one has failed."""
    for name, found in checks.items():
        measured = [
            f"{what} {value:.2g} (at most {limit:g})" for what, (value, limit) in found.items()
        ]
        print(f"check: {name}: {', '.join(measured)}", flush=True)
    values = [pair for found in checks.values() for pair in found.values()]
    if not all(value <= limit for value, limit in values):  # NaN fails
        sys.exit("a check failed: nothing was timed")


def rows_table(rows: list[Row]) -> str:
    header = (
        "case",
        "subject",
        "n",
        "s/step (least to most)",
        "s/sample",
        "tokens/s",
        "TFLOP/s",
        "of the floor",
        "peak GiB",
        "loss",
    )
    cells = [
        (
            row["case"],
            row["subject"],
            str(row["n"]),
            f"{row['s']:.4f} ({row['min_s']:.4f} to {row['max_s']:.4f})",
            f"{row['s'] / row['samples']:.4f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['model_tflops']:.0f}",
            f"{row['of_floor']:.3f}",
            f"{row['peak_gib']:.1f}",
            f"{row['loss']:.4f}",
        )
        for row in rows
    ]
    return table(header, cells, align="<<>>>>>>>>")


def planned(
    config: TrainConfig, wan: WanConfig, bucket: Bucket, card_name: str, kernel: str, capped: bool
) -> str:
    """What tools.plan says of our step on this card, to be held against the rows. kernel: of
    self-attention, as it was chosen here. capped: on a card that has CAP_GIB alone.
    """
    model = msgspec.structs.replace(config.model, attention=kernel)
    config = msgspec.structs.replace(config, model=model)
    cards = [card._replace(memory_gib=CAP_GIB) if capped else card for card in CARDS]
    for one in budget(config, wan, {bucket: 1.0}, num_gpus=1, cards=cards).cards:
        if one.card.name.split("-")[0] in card_name and one.step_s is not None:
            peak_gib = (one.num_bytes - CONTEXT_BYTES) / GIB
            cap = f", {CAP_GIB} GiB of it" if capped else ""
            return (
                f"planned for {one.card.name}{cap}, {kernel} attention: {one.step_s.slow:.4f} s, "
                f"{peak_gib:.1f} GiB"
            )
    return f"planned: no rates for {card_name} with {kernel} attention"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="native")
    parser.add_argument("--model", choices=MODELS, default="ti2v-5b")
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument("--cases", default="t2v,i2v,r32")
    parser.add_argument(
        "--subjects", default=";".join(DEFAULT_SUBJECTS), help="of " + "; ".join(SUBJECTS)
    )
    parser.add_argument("--samples", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budget-s", type=float, default=500.0, help="one round a case from then on"
    )
    parser.add_argument("--layers", type=int, default=0, help="blocks; 0: the model's own number")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.cases = arguments.cases.split(",")
    arguments.subjects = [name.strip() for name in arguments.subjects.split(";")]
    if unknown := {*arguments.cases} - CASES.keys() | {*arguments.subjects} - {*SUBJECTS}:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; cases are {', '.join(CASES)}, subjects "
            f"{'; '.join(SUBJECTS)}"
        )
    try:
        MODELS[arguments.model].kind.layout.parse(arguments.shape)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main() -> None:
    arguments = parse_arguments()
    check_start("bench.step", arguments.json)
    begin_s, device = time.perf_counter(), torch.device("cuda")
    model, profile = MODELS[arguments.model], PROFILES[arguments.profile]
    bucket, config = model.kind.layout.parse(arguments.shape), model.wan
    if arguments.layers:
        config = msgspec.structs.replace(config, num_layers=arguments.layers)
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

    if not arguments.no_check and arguments.model == "ti2v-5b":
        result["checks"] = step_check_training.check(
            config,
            bucket,
            profile.dtype,
            profile.checked,
            CASES,
            device,
            tensor_cores=profile.tensor_cores,
        )
        save(arguments.json, result)
        print_checks(result["checks"])
        step_check_training.free_memory()
    # cases with the same adapters share their models
    for adapters in dict.fromkeys(CASES[case][0] for case in arguments.cases):
        bench = Subjects(
            config,
            model.kind,
            bucket,
            profile,
            ADAPTERS[adapters],
            arguments.subjects,
            device,
            arguments.samples,
        )
        for line in describe_kernels(bench.run.kernels):
            print(line)
        print(
            f"{adapters}: ours: {describe(bench.run.plans[bucket])}; beside a model of "
            f"{bench.resident['ours'] / GIB:.2f} GiB",
            flush=True,
        )
        num_tokens = bench.shape.num_tokens
        plan = planned(
            bench.run.config,
            bench.config,
            bench.bucket,
            torch.cuda.get_device_name(bench.device),
            bench.run.kernels.kernel_for(num_tokens, num_tokens),
            bench.profile.capped,
        )
        print(plan, flush=True)
        for case in arguments.cases:
            if CASES[case][0] == adapters:
                done, deadline_s = result["rows"], begin_s + arguments.budget_s
                for rows in rows_of(bench, case, arguments.rounds, deadline_s):
                    result["rows"] = done + rows
                    save(arguments.json, result)
        del bench
        step_check_training.free_memory()
    print(f"{result['card']}, {arguments.model}, {arguments.profile}, {arguments.shape}")
    print(rows_table(result["rows"]))
    print(f"took {time.perf_counter() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
