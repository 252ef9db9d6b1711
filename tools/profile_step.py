"""Where a step's time goes: `python -m tools.profile_step CONFIG.toml [--shape 1280x704x49]
[--output DIR]`.

Runs a few optimizer-less steps of the configured model on one GPU with a random sample, writes a
trace for Perfetto (trace.json.gz) and prints the ten costliest operations of a block against
their floor: operations over the rate of the tensor cores, or bytes over the rate of memory,
whichever is longer. `--random` takes random weights of the size in model.path's config.json, or
of TI2V-5B where there is no such file.

The floor of a GEMM or attention call is counted from its shapes; of our own kernels from the
tensors that each reads and writes once; the rates are those of tools/plan.py for this card. What
has no floor here says "-".
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch.profiler import ProfilerActivity, profile

from loader.config import load_toml
from loader.shape import WAN22, Bucket
from tools.fake.step import random_batch, random_transformer
from tools.plan import CARDS, Card
from train import setup
from train.activations.plan import describe
from train.config import TrainConfig
from train.model.load import read_config
from train.model.wan import TI2V_5B, WanConfig
from train.parallel.mesh import World
from train.step import prepare

NUM_STEPS = 3
OPERATIONS = (
    "aten::",
    "newsreel::",
    "bitsandbytes::",
    "_drop",
    "_down",
    "_up",
    "_gradient",
    "_through_b",
    "_add_parts",
)


class Row(NamedTuple):
    """An operation: calls and milliseconds per block and step, its floor in ms (None: not
    known).
    """

    name: str
    calls: float
    ms: float
    floor_ms: float | None


def kernel_bytes(config: WanConfig, rows: int, dtype_bytes: int) -> dict[str, float]:
    """Bytes that each of our kernels reads and writes, for `rows` video tokens, as the mean of
    its calls in a block: norm and rotation of q/k/v, of q alone, and of the text's k, too short
    to count; GELU forward and backward (with an adapted ffn.net.2 both ride on `_down` and
    `_gradient`, on cards that have these).
    """
    wide, half, up = (
        4.0 * rows * config.dim,
        dtype_bytes * rows * config.dim,
        dtype_bytes * rows * config.ffn_dim,
    )
    return {
        "_residual_norm_forward": 2 * wide + 2 * half,
        "_residual_norm_backward": 3 * wide + 2 * half,
        "_norm_rope_forward": (4 + 2) * half / 3,
        "_norm_rope_backward": (8 + 3) * half / 3,
        "_gelu": (2 + 3) * up / 2,
    }


def operation_flops(name: str, shapes: list[Any]) -> float:
    """Of a GEMM or attention call with these input shapes; 0 for anything else."""
    if name in ("aten::mm", "aten::addmm"):
        left, right = (shapes[1], shapes[2]) if name == "aten::addmm" else (shapes[0], shapes[1])
        return 2.0 * left[0] * left[1] * right[1]
    if name.startswith("newsreel::flash4"):  # [B, L, H, E]
        (batch, length, heads, width), num_keys = shapes[0], shapes[1][1]
        return (10.0 if "backward" in name else 4.0) * batch * heads * length * num_keys * width
    if name.startswith("aten::_scaled_dot_product") or name.startswith("aten::_cudnn_attention"):
        q, k = (shapes[1], shapes[2]) if "backward" in name else (shapes[0], shapes[1])
        return (10.0 if "backward" in name else 4.0) * math.prod(q[:3]) * k[2] * q[3]
    return 0.0


def rows_of(
    events: Any, config: WanConfig, num_tokens: int, dtype_bytes: int, card: Card | None
) -> list[Row]:
    """The profiler's averages as rows, costliest first."""
    per_call, per_block, found = (
        kernel_bytes(config, num_tokens, dtype_bytes),
        config.num_layers * NUM_STEPS,
        [],
    )
    for event in events:
        ours = event.key in per_call
        if event.self_device_time_total == 0 or not (ours or event.key.startswith(OPERATIONS)):
            continue  # a kernel of such an operation is counted there
        flops, floor_s = operation_flops(event.key, event.input_shapes), 0.0
        if card is not None:
            attention = "attention" in event.key or "flash4" in event.key
            rate = max(card.attention_flops.values()) if attention else card.gemm_flops
            floor_s = per_call[event.key] / card.copy_bytes if ours else flops / rate
        name = (
            event.key
            if ours
            else f"{event.key} {[shape for shape in event.input_shapes[:3] if shape]}"
        )
        found.append(
            Row(
                name,
                event.count / per_block,
                event.self_device_time_total / 1e3 / per_block,
                floor_s * 1e3 * event.count / per_block or None,
            )
        )
    return sorted(found, key=lambda row: -row.ms)


def table(rows: list[Row], num_rows: int = 10) -> str:
    total = sum(row.ms for row in rows)
    lines = [f"{'ms/block':>9}{'calls':>7}{'floor ms':>10}{'x floor':>9}{'share':>7}  operation"]
    for row in rows[:num_rows]:
        floor, ratio = (
            ("-", "-")
            if row.floor_ms is None
            else (f"{row.floor_ms:.3f}", f"{row.ms / row.floor_ms:.2f}")
        )
        lines.append(
            f"{row.ms:9.3f}{row.calls:7.2f}{floor:>10}{ratio:>9}{row.ms / total:7.1%}  {row.name}"
        )
    lines.append(
        f"{total:9.3f}  all of a block's operations; {sum(row.ms for row in rows[num_rows:]):.3f} ms in the "
        f"{max(len(rows) - num_rows, 0)} that are not shown"
    )
    return "\n".join(lines)


def profile_step(config: TrainConfig, bucket: Bucket, output: Path, random: bool) -> str:
    """Profile NUM_STEPS micro-batches; writes the trace and returns the table."""
    device, dtype = torch.device("cuda", 0), getattr(torch, config.model.dtype)
    # one micro-batch on one GPU, and not as CUDA graphs, in which the profiler sees no operations
    alone = msgspec.structs.replace(config, global_batch=config.micro_batch, cuda_graph_tokens=0)
    model = None
    if random:
        found = Path(config.model.path) / "transformer" / "config.json"
        wan = read_config(found) if found.exists() else TI2V_5B
        model = random_transformer(wan, device, dtype)
    run = setup.build(alone, World(0, 1, device), [bucket], model=model)
    batch = random_batch(
        bucket,
        device,
        is_i2v=[bool(i % 2) for i in range(config.micro_batch)],
        text_dim=run.model.config.text_dim,
    )

    def micro_batch() -> None:
        run.micro_step.forward(prepare(batch, config.flow))
        run.micro_step.backward()

    for _ in range(2):
        micro_batch()
    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True
    ) as profiler:
        for _ in range(NUM_STEPS):
            micro_batch()
        torch.cuda.synchronize()
    output.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(output / "trace.json.gz"))
    card_name = torch.cuda.get_device_name(device)
    rows = rows_of(
        profiler.key_averages(group_by_input_shape=True),
        run.model.config,
        config.micro_batch * WAN22.num_tokens(bucket),
        dtype.itemsize,
        card=next((card for card in CARDS if card.name.split("-")[0] in card_name), None),
    )
    return (
        f"{card_name}, {config.model.dtype}, {run.attention_name} attention, {bucket} x "
        f"{config.micro_batch}: {describe(run.model.config, run.plans[bucket])}\n{table(rows)}\n"
        f"trace: {output / 'trace.json.gz'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override one key of the file",
    )
    parser.add_argument("--shape", default="1280x704x49", metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument(
        "--output", type=Path, help="folder of the trace (default: the run's output)"
    )
    parser.add_argument(
        "--random", action="store_true", help="random weights instead of model.path's"
    )
    arguments = parser.parse_args()
    try:
        if not torch.cuda.is_available():
            raise ValueError("there is no GPU here to profile")
        config = load_toml(arguments.config, TrainConfig, arguments.set)
        print(
            profile_step(
                config,
                WAN22.parse(arguments.shape),
                arguments.output or config.output_dir,
                arguments.random,
            )
        )
    except (ValueError, OSError) as error:
        sys.exit(f"profile_step: {error}")


if __name__ == "__main__":
    main()
