"""One sample on several GPUs against one GPU and against data parallelism:

    torchrun --nproc-per-node 2 -m bench.sequence [--sequence 2] [--json FILE]
    torchrun --nproc-per-node 4 -m bench.sequence --sequence 2      two samples at a time
    ... --model t2v-a14b --shapes 832x480x49=block [--sides one,sequence]

also with NCCL_P2P_DISABLE=1. The trainer's step with random weights of the real size; each shape
comes with its activation_memory, the same on all sides (a budget in GiB is divided by the ranks).
Sides are measured in the order of --sides: one GPU, all of them on shared samples ("sequence") or
on samples of their own ("data"). What each took is printed, and stands in the JSON file, before the
next one is built. First, in the same call, the flat gradient of all ranks together is compared
with that of one rank, in float32 and at reduced depth. The bytes that a rank sends are counted and
compared with what tools.plan says.
"""

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.our_step import ADAPTERS, MODELS, Model, our_config
from bench.results import check_start, save
from bench.sequence_timing import Case, Measured, build, exchange_rate, measure, sum_gradients
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from tools.counts import exchanged_bytes
from train.activations.budget import parse_activation_memory
from train.activations.plan import plan_shape
from train.activations.sizes import Shape
from train.parallel import mesh
from train.parallel.mesh import World
from train.parallel.sequence import check_heads, check_sequence

CHECK_LIMIT = 1e-5
# in half precision two orders of summing differ by more; a wrong exchange by about 1
HALF_LIMIT = 0.05
# one GPU comes twice, because clocks change
SIDES = ("one", "sequence", "data", "one")


def gradient_error(
    model: Model, bucket: Bucket, dtype: torch.dtype, num_layers: int, world: World
) -> float:
    """How far all ranks' gradient together is off one rank's, relative. Each group has the same
    sample, so their mean is that sample's gradient.
    """
    shallow = model._replace(wan=msgspec.structs.replace(model.wan, num_layers=num_layers))
    found = []
    for of in (world, alone(world)):
        run = build(shallow, Case(bucket, "block"), dtype, of)
        sum_gradients(run, model, bucket, seed=0)
        found.append(run.flat.gradient.clone())
    together, one = found
    return ((together - one).norm() / one.norm()).item()


def alone(world: World) -> World:
    return World(data_rank=0, data_size=1, device=world.device)


def data_parallel(world: World) -> World:
    return World(data_rank=world.rank, data_size=world.size, device=world.device)


def predicted_bytes(model: Model, case: Case, dtype: torch.dtype, run_shape: Shape) -> float:
    """What tools.plan says that a rank sends in a micro-batch."""
    config = our_config(ADAPTERS["r16"], dtype, "auto", kind=model.kind)
    budget_bytes = parse_activation_memory(case.activation_memory)
    assert budget_bytes is not None
    plan = plan_shape(
        model.wan,
        run_shape,
        config.lora.targets,
        dtype.itemsize,
        budget_bytes / run_shape.num_parts,
    )
    return exchanged_bytes(model.wan, run_shape, config.lora.targets, dtype.itemsize, plan)


def compare(
    model: Model,
    case: Case,
    dtype: torch.dtype,
    world: World,
    rounds: int,
    sides: Sequence[str],
    note: Callable[[dict[str, Any]], None],
) -> None:
    """Each of `sides` in turn. note(found): called after each, and at the end."""
    worlds = {"one": alone(world), "sequence": world, "data": data_parallel(world)}
    measured: dict[str, list[Measured]] = {}
    found: dict[str, Any] = {"activation_memory": case.activation_memory, "sides": []}
    for side in sides:
        # who does not take part waits; memory is given back between sides
        if side != "one" or world.is_main:
            this = measure(model, case, dtype, worlds[side], rounds)
            measured.setdefault(side, []).append(this)
            found["sides"].append({"side": side, **this._asdict()})
            note(found)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        mesh.barrier(world)
    if "sequence" in measured:
        size, layout = world.sequence_size, model.kind.layout
        shape = Shape(1, layout.num_tokens(case.bucket) // size, MAX_TEXT_TOKENS, num_parts=size)
        found |= {
            "sent_bytes": measured["sequence"][0].sent_bytes,
            "predicted_bytes": predicted_bytes(model, case, dtype, shape),
            "exchange_bytes_a_second": exchange_rate(model, case.bucket, dtype, world),
        }
    if world.is_main:
        found |= {"n": rounds} | speeds(measured, world)
    note(found)


def speeds(measured: dict[str, list[Measured]], world: World) -> dict[str, Any]:
    """Medians by side, and against one GPU where that was measured."""
    step_s = {
        side: statistics.median([s for each in all_of for s in each.step_s])
        for side, all_of in measured.items()
    }
    found: dict[str, Any] = {
        "step_s": step_s,
        "activation_gib": {
            side: all_of[0].activation_bytes / 2**30 for side, all_of in measured.items()
        },
    }
    if "one" in step_s and "sequence" in step_s:
        # of one sample on the cards of a group; of samples a second on all cards
        found["speed_of_a_sample"] = step_s["one"] / step_s["sequence"]
        found["samples_a_second_of_one"] = world.data_size * found["speed_of_a_sample"]
    if "one" in step_s and "data" in step_s:
        found["data_parallel_of_one"] = world.size * step_s["one"] / step_s["data"]
    return found


def report(
    model: Model,
    cases: Sequence[Case],
    dtype: torch.dtype,
    world: World,
    *,
    rounds: int,
    check_layers: int,
    check_bucket: Bucket | None = None,
    sides: Sequence[str] = SIDES,
    path: Path | None = None,
) -> dict[str, Any]:
    """The main process says what it finds as it goes, and writes it to `path`. check_bucket: where
    gradients are compared, by default the smallest of `cases`. Raises AssertionError where they
    differ, before anything is timed.
    """
    card = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "card": card,
        "processes": world.size,
        "sequence": world.sequence_size,
        "model": model.kind.name,
        "NCCL_P2P_DISABLE": os.environ.get("NCCL_P2P_DISABLE", "0"),
        "gradient_error": {},
    }

    def note(place: dict[str, Any], name: str, found: Any) -> None:
        place[name] = found
        if world.is_main:
            print(f"{name}: {json.dumps(found)}", flush=True)
            save(path, result)

    checked = check_bucket or min((case.bucket for case in cases), key=model.kind.layout.num_tokens)
    limits = {dtype: HALF_LIMIT, torch.float32: CHECK_LIMIT}
    for each, limit in limits.items():
        error = gradient_error(model, checked, each, check_layers, world)
        assert error < limit, f"the gradient of {world.sequence_size} ranks is off by {error}"
        note(result["gradient_error"], str(each), error)
    for case in cases:
        note_case = partial(note, result, str(case.bucket))
        compare(model, case, dtype, world, rounds, sides, note_case)
    return result


def parse_cases(model: Model, text: str, size: int) -> list[Case]:
    """Of --shapes, for `size` ranks of a sample. Raises ValueError."""
    cases = []
    for pair in text.split(","):
        shape, _, memory = pair.partition("=")
        case = Case(model.kind.layout.parse(shape), memory or "block")
        if parse_activation_memory(case.activation_memory) is None:
            raise ValueError('activation_memory = "auto" differs between the sides: name a budget')
        cases.append(case)
    check_heads(size, model.wan.num_attention_heads)
    check_sequence(
        size, {str(case.bucket): model.kind.layout.num_tokens(case.bucket) for case in cases}
    )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequence", type=int, default=2)
    parser.add_argument("--model", choices=sorted(MODELS), default="ti2v-5b")
    parser.add_argument(
        "--shapes",
        default="1280x704x49=all,1280x704x121=block",
        help="shape = activation_memory, ...",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check-layers", type=int, default=2)
    parser.add_argument("--check-shape", help="the smallest shape if not given")
    parser.add_argument("--sides", default=",".join(SIDES), help="in this order")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, sides = MODELS[arguments.model], arguments.sides.split(",")
    if unknown := {*sides} - {*SIDES}:
        parser.error(f"--sides: unknown: {', '.join(unknown)}; there are {', '.join(SIDES[:3])}")
    check_bucket = None
    try:
        cases = parse_cases(model, arguments.shapes, arguments.sequence)
        if arguments.check_shape:
            ((check_bucket, _),) = parse_cases(model, arguments.check_shape, arguments.sequence)
    except ValueError as error:
        parser.error(str(error))
    check_start("bench.sequence", arguments.json)
    with mesh.process_group(arguments.sequence) as world:
        if world.sequence_size < 2:
            raise SystemExit("--sequence 1 has nothing to compare with: use 2 or more")
        report(
            model,
            cases,
            torch.bfloat16,
            world,
            rounds=arguments.rounds,
            check_layers=arguments.check_layers,
            check_bucket=check_bucket,
            sides=sides,
            path=arguments.json,
        )


if __name__ == "__main__":
    mesh.run_program(main)
