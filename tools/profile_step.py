"""Where a step's time goes: `python -m tools.profile_step CONFIG.toml [--shape 1280x704x49]
[--output DIR]`.

Runs a few optimizer-less steps of the configured model on one GPU with a random sample, writes a
trace for Perfetto (trace.json.gz) and prints the ten costliest operations of a block against
their floor: operations over the rate of the tensor cores, or bytes over the rate of memory,
whichever is longer. `--random` takes random weights of the size in model.path's config.json, or
of TI2V-5B where there is no such file.

The floor of a GEMM or attention call is counted from its shapes; of our own kernels from the
tensors that each reads and writes once; the rates are those of tools/cards.py for this card. What
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

from loader import models
from loader.config import load_toml
from loader.files import told
from loader.shape import Bucket
from tools.cards import CARDS, Card
from tools.fake.step import random_batch, random_transformer
from tools.table import table
from train import setup
from train.activations.plan import describe
from train.base import base_kind, transformer_folder
from train.choices import micro_shapes
from train.config import TrainConfig
from train.model.load import read_config
from train.model.wan import TI2V_5B, WanConfig
from train.parallel.mesh import World
from train.step import prepare

NUM_STEPS = 3
# prefixes of operations, whose kernels are counted with them: torch's, our custom operations, and
# our Triton kernels
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
    """An operation, per block and step."""

    name: str
    calls: float
    ms: float
    # None: not known
    floor_ms: float | None


def kernel_bytes(config: WanConfig, num_rows: int, dtype_bytes: int) -> dict[str, float]:
    """Bytes that each of our kernels reads and writes, for `num_rows` video tokens, as the mean of
    its calls in a block: norm and rotation of q/k/v, of q alone, and of the text's k, too short
    to count; GELU forward and backward (with an adapted ffn.net.2 both ride on `_down` and
    `_gradient`, on cards that have these).
    """
    stream = 4.0 * num_rows * config.dim
    row = dtype_bytes * num_rows * config.dim
    wide = dtype_bytes * num_rows * config.ffn_dim
    return {
        "_residual_norm_forward": 2 * stream + 2 * row,
        "_residual_norm_backward": 3 * stream + 2 * row,
        "_norm_rope_forward": (4 + 2) * row / 3,
        "_norm_rope_backward": (8 + 3) * row / 3,
        "_gelu": (2 + 3) * wide / 2,
    }


def operation_flops(name: str, shapes: list[Any]) -> float:
    """Of a GEMM or attention call with these input shapes; 0 for anything else."""
    if name in ("aten::mm", "aten::addmm"):
        left, right = shapes[1:3] if name == "aten::addmm" else shapes[0:2]
        return 2.0 * left[0] * left[1] * right[1]
    # forward q k^T and P v; backward five products
    each = 10.0 if "backward" in name else 4.0
    if name.startswith("newsreel::flash4"):  # q [B, L, H, E], k [B, S, H, E]
        (batch, length, heads, width), num_keys = shapes[0], shapes[1][1]
        return each * batch * heads * length * num_keys * width
    if name.startswith(("aten::_scaled_dot_product", "aten::_cudnn_attention")):
        # q [B, H, L, E], k [B, H, S, E]; backward has the output's gradient first
        q, k = shapes[1:3] if "backward" in name else shapes[0:2]
        return each * math.prod(q[:3]) * k[2] * q[3]
    return 0.0


def floor_seconds(event: Any, bytes_per_kernel: dict[str, float], card: Card) -> float:
    """Of one call; 0 where it is not known."""
    if event.key in bytes_per_kernel:
        return bytes_per_kernel[event.key] / card.fast.copy_bytes
    is_attention = "attention" in event.key or "flash4" in event.key
    rate = max(card.fast.attention_flops.values()) if is_attention else card.fast.gemm_flops
    return operation_flops(event.key, event.input_shapes) / rate


def rows_of(
    events: Any, config: WanConfig, num_tokens: int, dtype_bytes: int, card: Card | None
) -> list[Row]:
    """The profiler's averages as rows, costliest first."""
    bytes_per_kernel = kernel_bytes(config, num_tokens, dtype_bytes)
    num_blocks = config.num_layers * NUM_STEPS
    rows = []
    for event in events:
        ours = event.key in bytes_per_kernel
        if event.self_device_time_total == 0 or not (ours or event.key.startswith(OPERATIONS)):
            continue  # a kernel of such an operation is counted there
        shapes = [shape for shape in event.input_shapes[:3] if shape]
        floor_s = floor_seconds(event, bytes_per_kernel, card) if card else 0.0
        row = Row(
            name=event.key if ours else f"{event.key} {shapes}",
            calls=event.count / num_blocks,
            ms=event.self_device_time_total / 1e3 / num_blocks,
            floor_ms=floor_s * 1e3 * event.count / num_blocks or None,
        )
        rows.append(row)
    return sorted(rows, key=lambda row: -row.ms)


def report(rows: list[Row], num_shown: int = 10) -> str:
    """The costliest rows as a table, and a line with the sum of all."""
    total_ms = sum(row.ms for row in rows)

    def cells(row: Row) -> tuple[str, ...]:
        floor, ratio = "-", "-"
        if row.floor_ms is not None:
            floor, ratio = f"{row.floor_ms:.3f}", f"{row.ms / row.floor_ms:.2f}"
        share = f"{row.ms / total_ms:.1%}"
        return f"{row.ms:.3f}", f"{row.calls:.2f}", floor, ratio, share, row.name

    header = ("ms/block", "calls", "floor ms", "x floor", "share", "operation")
    hidden = rows[num_shown:]
    return (
        f"{table(header, map(cells, rows[:num_shown]), align='>>>>><')}\n"
        f"{total_ms:9.3f}  all of a block's operations; {sum(row.ms for row in hidden):.3f} ms in "
        f"the {len(hidden)} that are not shown"
    )


def profile_step(config: TrainConfig, bucket: Bucket, output: Path, random: bool) -> str:
    """Profile NUM_STEPS micro-batches; writes the trace and returns the table."""
    if config.parallel.sequence > 1:
        raise ValueError(
            f"parallel.sequence = {config.parallel.sequence}: one process is profiled here; use "
            f"--set parallel.sequence=1"
        )
    device, dtype = torch.device("cuda", 0), getattr(torch, config.model.dtype)
    # one micro-batch on one GPU, and not as CUDA graphs, in which the profiler sees no operations
    found = Path(config.model.path) / transformer_folder(config) / "config.json"
    kind = base_kind(config) if found.exists() else models.TI2V_5B
    kind.layout.check(bucket)
    num_samples = micro_shapes(config, 1, [bucket], kind.layout)[bucket].batch
    # nor is anything sampled: the datasets need not be here
    samples = msgspec.structs.replace(config.samples, every=0)
    alone = msgspec.structs.replace(
        config, global_batch=num_samples, cuda_graph_tokens=0, samples=samples
    )
    model = None
    if random:
        wan = read_config(found) if found.exists() else TI2V_5B
        model = random_transformer(wan, device, dtype)
    run = setup.build(alone, World(0, 1, device), [bucket], model=model)
    batch = random_batch(
        bucket,
        device,
        is_i2v=[bool(i % 2) and kind.i2v_share != 0 for i in range(num_samples)],
        text_dim=run.model.config.text_dim,
        kind=kind,
    )

    def micro_batch() -> None:
        run.micro_step.forward(prepare(batch, run.laws))
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
        num_samples * kind.layout.num_tokens(bucket),
        dtype.itemsize,
        card=next((card for card in CARDS if card.name.split("-")[0] in card_name), None),
    )
    return (
        f"{card_name}, {config.model.dtype}, {run.kernels.names} attention, {bucket} x "
        f"{num_samples}: {describe(run.plans[bucket])}\n{report(rows)}\n"
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
                Bucket.parse(arguments.shape),
                arguments.output or config.output_dir,
                arguments.random,
            )
        )
    except (ValueError, OSError) as error:
        sys.exit(f"profile_step: {told(error)}")


if __name__ == "__main__":
    main()
