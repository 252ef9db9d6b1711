"""Which attention kernel runs: chosen before the first step, by name or by timing, logged, and
never switched behind anyone's back.

A V100 (sm_70) has torch's memory-efficient kernel ("efficient") and attention from GEMMs ("gemm",
train/kernels/attention_gemm.py), which is faster from some length on; Ampere adds "flash", Hopper
"cudnn" and, with the package flash-attn-4, "flash4". Which is the fastest depends on the card and
on the lengths, so "auto" times those that can run, forward and backward, at the lengths of the run.
`deterministic` times nothing, because a timing may come out differently each time, and chooses
among kernels that repeat their bits.

Shapes: B samples, H heads, L queries, S keys, E width of a head.
"""

import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.kernels.attention_flash4 import flash4_forward, has_flash4
from train.kernels.attention_gemm import gemm_attention_forward

Attention = Callable[..., Tensor]  # (q, k, v, num_padding = 0): see run_kernel
AttentionName = Literal["auto", "gemm", "flash4", "cudnn", "flash", "efficient", "math"]
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What runs attention in the forward pass: the activation plan may save their outputs.
OPERATIONS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.newsreel.flash4_forward.default,
    torch.ops.newsreel.gemm_attention_forward.default,
}
# Their backward passes give other bits each time, whatever torch is told.
NOT_DETERMINISTIC = ("flash4", "cudnn")
# With fewer keys flash4 is slower than cuDNN (512 keys, 11,440 queries, 24 x 128, bf16, one H200:
# 0.95 and 0.83 ms), and leaves the call to it.
FLASH4_MIN_KEYS = 1024
# Without timing: on an H100 and an H200 GEMMs win over the memory-efficient kernel at 11,440 keys
# and lose at 5,070.
GEMM_MIN_KEYS = 8192


class AttentionShape(NamedTuple):
    """Samples, heads, queries, keys and the width of a head."""

    batch: int
    num_heads: int
    num_queries: int
    num_keys: int
    head_dim: int


class Row(NamedTuple):
    """The kernel for one pair of lengths, and milliseconds of those that were timed, forward and
    backward together; None: can't run there, or not in this memory.
    """

    num_queries: int
    num_keys: int
    kernel: str
    times_ms: dict[str, float | None]


class Choice(NamedTuple):
    """`kernel` is what runs where `rows` is empty; else the row of the same or the nearest lengths
    decides. `card`: where the rows were made.
    """

    kernel: str
    card: str
    rows: tuple[Row, ...]

    def kernel_for(self, num_queries: int, num_keys: int) -> str:
        if not self.rows:
            return self.kernel
        return min(
            self.rows,
            key=lambda row: (abs(row.num_keys - num_keys), abs(row.num_queries - num_queries)),
        ).kernel

    @property
    def names(self) -> str:
        """For people: the kernels that run."""
        return " and ".join(dict.fromkeys(row.kernel for row in self.rows)) or self.kernel

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_padding: int = 0) -> Tensor:
        """See `run_kernel`."""
        return run_kernel(self.kernel_for(q.shape[2], k.shape[2]), q, k, v, num_padding)

    def table(self) -> dict[str, Any]:
        """For a checkpoint or a file: only dicts, lists, strings and numbers. See `from_table`."""
        return {
            "kernel": self.kernel,
            "card": self.card,
            "rows": [row._asdict() for row in self.rows],
        }


def from_table(table: dict[str, Any]) -> Choice:
    """The Choice whose `table()` this is."""
    return Choice(table["kernel"], table["card"], tuple(Row(**row) for row in table["rows"]))


def describe(choice: Choice) -> list[str]:
    """Lines for the log."""
    if not choice.rows:
        return [f"attention: {choice.kernel}"]
    return [
        f"attention of {row.num_queries:,} queries and {row.num_keys:,} keys: {row.kernel}"
        + (" of " if row.times_ms else "")
        + ", ".join(
            f"{name} {'none' if ms is None else f'{ms:.2f} ms'}"
            for name, ms in row.times_ms.items()
        )
        for row in choice.rows
    ]


def choose_attention(
    name: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    shapes: Sequence[AttentionShape] = (),
    kernels: Sequence[str] | None = None,
    time: Callable[[str, AttentionShape, torch.device, torch.dtype], float] | None = None,
) -> Choice:
    """The kernel `name`, or for "auto" the fastest of `kernels` (default: `candidates`) for each
    pair of lengths in `shapes`. `time`: milliseconds of a kernel at a shape, `time_ms` if None.

    Raises ValueError for a kernel that can't run here: it never becomes another one.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        _refuse_emulation(device)
    card = card_name(device)
    kernels = candidates(device, dtype, deterministic) if kernels is None else kernels
    time = time or time_ms
    if name != "auto" or len(kernels) == 1:
        kernel = kernels[0] if name == "auto" else name
        _refuse(kernel, device, dtype, deterministic)
        return Choice(kernel, card, ())
    rows = []
    for shape in _one_of_each_length(shapes):
        times_ms = {}
        if deterministic:
            kernel = fixed_kernel(kernels, shape)
        else:
            timed = [
                kernel
                for kernel in kernels
                if kernel != "flash4" or shape.num_keys >= FLASH4_MIN_KEYS
            ]
            times_ms = {
                kernel: _time_or_none(partial(time, kernel, shape, device, dtype))
                for kernel in timed
            }
            done = {kernel: ms for kernel, ms in times_ms.items() if ms is not None}
            if not done:
                raise ValueError(
                    f'model.attention = "auto": none of {", ".join(timed)} can run {shape} in '
                    f"{dtype} on {card}; use smaller windows.buckets or a smaller micro-batch"
                )
            kernel = min(done, key=done.__getitem__)
        rows.append(Row(shape.num_queries, shape.num_keys, kernel, times_ms))
    return Choice(kernels[0], card, tuple(rows))


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def still_holds(
    choice: Choice, device: torch.device, dtype: torch.dtype, shapes: Sequence[AttentionShape]
) -> bool:
    """Whether this choice, made earlier, was made on such a card, of kernels that can run here, and
    for these lengths.
    """
    chosen = {(row.num_queries, row.num_keys): row.kernel for row in choice.rows}
    return (
        choice.card == card_name(device)
        and chosen.keys() == {(shape.num_queries, shape.num_keys) for shape in shapes}
        and set(chosen.values()) <= set(candidates(device, dtype))
    )


def candidates(device: torch.device, dtype: torch.dtype, deterministic: bool = False) -> list[str]:
    """Kernels that can run here, those first that tend to be fast."""
    if device.type == "cpu":
        return ["flash"]
    if dtype == torch.float32:
        return ["efficient"]
    major, _ = torch.cuda.get_device_capability(device)
    can_run = {
        "flash4": has_flash4(device, dtype),
        "cudnn": major >= 9,
        "flash": major >= 8,
        "efficient": True,
        "gemm": dtype == torch.float16,
    }
    return [
        name
        for name, here in can_run.items()
        if here and not (deterministic and name in NOT_DETERMINISTIC)
    ]


def fixed_kernel(kernels: Sequence[str], shape: AttentionShape) -> str:
    """Without timing: the first, but GEMMs instead of the memory-efficient kernel for many keys."""
    if kernels[0] == "efficient" and "gemm" in kernels and shape.num_keys >= GEMM_MIN_KEYS:
        return "gemm"
    return kernels[0]


def run_kernel(name: str, q: Tensor, k: Tensor, v: Tensor, num_padding: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(E)) v without a mask: q [B, H, L, E], k and v [B, H, S, E] -> [B, H, L,
    E], in their dtype.

    `num_padding` asks for so many columns of padding behind the output's rows of [B, L, H * E],
    which "flash4" and "gemm" grant: see train/lora/linear.py.
    """
    if name == "gemm":
        out: Tensor = gemm_attention_forward(q, k, v, num_padding)[0]
        return out
    if name == "flash4" and k.shape[2] >= FLASH4_MIN_KEYS:
        out_BLHE, _ = flash4_forward(*(x.transpose(1, 2) for x in (q, k, v)), num_padding)
        return out_BLHE.transpose(1, 2)
    with sdpa_kernel(_BACKENDS["cudnn" if name == "flash4" else name]):
        return F.scaled_dot_product_attention(q, k, v)


def random_inputs(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((q, k, v) that need gradients, the output's gradient), as the model has them: [B, L, H * E],
    seen as [B, H, L, E]. Logits have deviation 1.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(
            (shape.batch, length, shape.num_heads, shape.head_dim),
            generator=generator,
            device=device,
            dtype=dtype,
        ).transpose(1, 2)
        for length in (shape.num_queries, shape.num_keys, shape.num_keys, shape.num_queries)
    )
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), dout


def time_ms(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> float:
    """Median milliseconds of one forward and backward pass on a GPU, after one that compiles."""
    inputs, dout = random_inputs(shape, device, dtype)
    found = []
    for _ in range(1 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.autograd.grad(run_kernel(name, *inputs), inputs, dout)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found[1:])


def _time_or_none(time: Callable[[], float]) -> float | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # in which torch says why not
            return time()
    except RuntimeError:  # no kernel for this width of a head or this card, or out of memory
        return None


def _one_of_each_length(shapes: Sequence[AttentionShape]) -> list[AttentionShape]:
    """Of several batches of the same lengths the largest."""
    largest: dict[tuple[int, int], AttentionShape] = {}
    for shape in sorted(shapes):
        largest[shape.num_queries, shape.num_keys] = shape
    return [largest[lengths] for lengths in sorted(largest)]


def _refuse(name: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> None:
    """ValueError if this kernel can't run here."""
    if deterministic and name in NOT_DETERMINISTIC:
        raise ValueError(
            f'model.attention = "{name}" gives other bits each time: with deterministic = true use '
            f'"gemm", "flash", "efficient" or "auto"'
        )
    if name == "gemm" and dtype == torch.bfloat16:
        raise ValueError(
            'model.attention = "gemm" stores logits in model.dtype, and bfloat16 has too few bits '
            'for them; set model.dtype = "float16" or attention = "auto"'
        )
    if name == "flash4" and not has_flash4(device, dtype):
        raise ValueError(
            f'model.attention = "flash4" needs the package flash-attn-4 (the extra flash4), a '
            f"Hopper GPU and float16 or bfloat16, not {dtype} on {device.type}; "
            f'set "auto" or "cudnn"'
        )
    like_text = AttentionShape(1, 24, 512, 512, 128)
    inputs, _ = random_inputs(like_text, device, dtype)
    try:
        with warnings.catch_warnings(action="ignore"):  # in which torch says why not
            run_kernel(name, *inputs)
    except RuntimeError as error:
        raise ValueError(
            f'model.attention = "{name}" can\'t run in {dtype} on this {device.type} ({error}); '
            f'set "auto"'
        ) from error


def _refuse_emulation(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"model.dtype = bfloat16: {torch.cuda.get_device_name(device)} would emulate it, many "
            f'times slower; set model.dtype = "float16"'
        )
