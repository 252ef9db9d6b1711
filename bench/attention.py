"""Every attention kernel that can run on this card, side by side: python -m bench.attention

Takes a minute, needs a GPU and nothing but torch and Triton. At four lengths of self-attention
(832x480x9, 832x480x49, 1280x704x49 and 1280x704x121 of Wan2.2-TI2V-5B), 24 heads of 128, each
kernel is

- checked against float32 arithmetic on the same inputs: the relative L2 distance of the output and
  of each gradient, at logits of deviation 1 and 4, and whether all of them are finite where logits
  reach 200 in magnitude;
- timed, forward and backward, by CUDA events, the kernels taking turns in random order: median,
  least and most of at least ten rounds (fewer where a length takes more than its time), and the
  memory that one pass allocates.

Prints a table, length by length, and writes it as JSON, to be sent to the authors: a V100's figures
are not known.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.results import check_start, save
from train.kernels.attention_gemm import attention_eager
from train.model.attention import AttentionShape, candidates, random_inputs, run_kernel

PARTS = ("out", "dq", "dk", "dv")
LENGTHS = (1_170, 5_070, 11_440, 27_280)
# Of one head in float32, this many rows at a time: 1 GiB of logits at 27,280 keys.
REFERENCE_ROWS = 8192


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def reference(
    q_LE: Tensor, k_SE: Tensor, v_SE: Tensor, dout_LE: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of one head in float32, a number of rows at a time."""
    leaves = [x.detach().float().requires_grad_() for x in (q_LE, k_SE, v_SE)]
    outs = []
    for first in range(0, len(q_LE), REFERENCE_ROWS):
        rows = slice(first, first + REFERENCE_ROWS)
        out = attention_eager(leaves[0][rows], leaves[1], leaves[2])
        out.backward(dout_LE[rows].float())
        outs.append(out.detach())
    dq, dk, dv = (leaf.grad for leaf in leaves)
    assert dq is not None and dk is not None and dv is not None
    return torch.cat(outs), dq, dk, dv


def accuracy(
    kernels: list[str],
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    deviation: float | None,
) -> dict[str, dict[str, float | bool]]:
    """Per kernel the distance from float32 of output and gradients, in the first head and the
    last. `deviation`: of the logits; None: the largest of these two heads is 200.
    """
    (q, k, v), dout = random_inputs(shape, device, dtype)
    heads = sorted({0, shape.num_heads - 1})
    factor = 200 / largest_logit(q, k, heads) if deviation is None else deviation
    q = (q.detach().float() * factor).to(dtype).requires_grad_()
    found: dict[str, dict[str, float | bool]] = {}
    expected = [reference(*(x[0, head].detach() for x in (q, k, v, dout))) for head in heads]
    for kernel in kernels:
        out = run_kernel(kernel, q, k, v)
        tensors = (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))
        distances = {
            name: max(
                relative(tensor[0, head], expected[i][number]) for i, head in enumerate(heads)
            )
            for number, (name, tensor) in enumerate(zip(PARTS, tensors, strict=True))
        }
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        found[kernel] = {**distances, "finite": finite}
    return found


def largest_logit(q: Tensor, k: Tensor, heads: list[int]) -> float:
    largest = 0.0
    for head in heads:
        for rows in q[0, head].detach().float().split(REFERENCE_ROWS):
            logits = rows @ k[0, head].detach().float().mT * q.shape[-1] ** -0.5
            largest = max(largest, logits.abs().amax().item())
    return largest


class Pass:
    """One kernel's forward and backward pass at one shape."""

    def __init__(self, kernel: str, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor):
        self._kernel, self._inputs, self._dout = kernel, inputs, dout

    def time(self) -> tuple[float, float]:
        """Milliseconds (forward, backward)."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        out = run_kernel(self._kernel, *self._inputs)
        events[1].record()
        torch.autograd.grad(out, self._inputs, self._dout)
        events[2].record()
        events[2].synchronize()
        return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])

    def peak_mib(self) -> float:
        """What a pass allocates beside its inputs, at its peak: output, gradients and scratch."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.time()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def timings(
    kernels: list[str],
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    num_rounds: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    inputs, dout = random_inputs(shape, device, dtype)
    passes = {kernel: Pass(kernel, inputs, dout) for kernel in kernels}
    peaks_mib = {kernel: one.peak_mib() for kernel, one in passes.items()}  # and warms up
    times_ms: dict[str, list[tuple[float, float]]] = {kernel: [] for kernel in kernels}
    order, begin_s = random.Random(0), time.perf_counter()
    for number in range(num_rounds):
        if number >= 3 and time.perf_counter() - begin_s > seconds:
            break
        for kernel in order.sample(kernels, len(kernels)):
            times_ms[kernel].append(passes[kernel].time())
    return {
        kernel: {
            "n": len(found),
            "forward_ms": statistics.median(forward for forward, _ in found),
            "backward_ms": statistics.median(backward for _, backward in found),
            "ms": statistics.median(map(sum, found)),
            "min_ms": min(map(sum, found)),
            "max_ms": max(map(sum, found)),
            "peak_mib": peaks_mib[kernel],
        }
        for kernel, found in times_ms.items()
    }


def print_header() -> None:
    print(
        "| tokens | kernel | n | forward + backward = ms (least to most) | of efficient | MiB | "
        "off float32 at 1 | at 4 | at 200 |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Those of one length."""
    base = next((row["ms"] for row in rows if row["kernel"] == "efficient"), None)
    for row in rows:
        worst = [max(row[name][part] for part in PARTS) for name in ("1", "4", "200")]
        cells = (
            f"{row['num_tokens']:,}",
            row["kernel"],
            f"{row['n']}",
            f"{row['forward_ms']:.2f} + {row['backward_ms']:.2f} = {row['ms']:.2f} "
            f"({row['min_ms']:.2f} to {row['max_ms']:.2f})",
            f"{row['ms'] / base:.3f}" if base else "",
            f"{row['peak_mib']:,.0f}",
            *(f"{error:.1e}" for error in worst[:2]),
            f"{worst[2]:.1e}" if row["200"]["finite"] else "NOT FINITE",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--keys", type=int, help="cross-attention with so many keys (text: 512)")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--kernels", nargs="+", help="default: all that can run here")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, to time a length")
    parser.add_argument("--output", type=Path, default=Path("bench_attention.json"))
    arguments = parser.parse_args()
    check_start("bench.attention", arguments.output)
    device, dtype = torch.device("cuda"), getattr(torch, arguments.dtype)
    kernels = arguments.kernels or candidates(device, dtype)
    # As in training; and float32 means float32 where it is the reference.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    begin_s = time.perf_counter()
    result: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "heads": arguments.heads,
        "head_dim": arguments.head_dim,
        "dtype": arguments.dtype,
        "rows": [],
    }
    print(f"{result['card']}, torch {result['torch']}, {arguments.heads} x {arguments.head_dim}")
    print_header()
    for length in arguments.lengths:
        shape = AttentionShape(
            1, arguments.heads, length, arguments.keys or length, arguments.head_dim
        )
        checks = {
            name: accuracy(kernels, shape, device, dtype, deviation)
            for name, deviation in (("1", 1.0), ("4", 4.0), ("200", None))
        }
        times = timings(kernels, shape, device, dtype, arguments.rounds, arguments.seconds)
        rows = [
            {"num_tokens": length, "num_keys": shape.num_keys, "kernel": kernel, **times[kernel]}
            | {name: found[kernel] for name, found in checks.items()}
            for kernel in kernels
        ]
        print_rows(rows)
        result["rows"] += rows
        result["seconds"] = time.perf_counter() - begin_s
        save(arguments.output, result)
    print(f"{arguments.output} written after {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
