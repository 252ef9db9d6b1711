"""The rates that a training step reaches on the cards that we know.

Those of the H200 are what the kernels of a step reach there at 1280x704x49 (tools.profile_step,
bench/README.md). The other cards' are their data sheets' peaks times the share of its peak that
the H200 reached, so times for them are *modelled* and may be far off, above all V100's. Its rates
are given as a range:

- GEMMs: the H200's share of the peak (82 of 112 TFLOP/s) to 90;
- the memory-efficient kernel: the H200's share (15 TFLOP/s) to 25. On a V100 its authors found it
  25% faster than plain attention forward and 19% slower backward
  (github.com/facebookresearch/xformers/pull/362);
- attention from GEMMs: a roofline, see `gemm_attention_flops`, times the share of it that the H200
  reached at 11,440 tokens, to all of it.

`python -m bench.attention` on a V100 would replace the last two.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """Per second: operations of half-precision GEMMs; of each attention kernel that runs there
    (forward and backward together, counting 3.5 times the forward); bytes moved.

    The kernel that "auto" takes comes first in `attention_flops`; with `deterministic` that is
    flash, where it runs.
    """

    gemm_flops: float
    attention_flops: dict[str, float]
    copy_bytes: float


class Card(NamedTuple):
    name: str
    memory_gib: float
    has_bfloat16: bool
    # where the rates come from
    source: str
    # equal where the rates are not given as a range
    slow: Rates
    fast: Rates
    # from the host per second, one direction: PCIe 3, 4 or 5 of 16 lanes less its overhead
    link_bytes: float
    # from one card to another of the same host, while as much comes back: PCIe 3, NVLink
    peer_bytes: float

    @property
    def rates(self) -> tuple[Rates, Rates]:
        return self.fast, self.slow


def gemm_attention_flops(gemm_flops: float, copy_bytes: float) -> float:
    """Attention from GEMMs by a roofline, heads of 128, operations per second counted as for the
    other kernels.

    For each score the seven GEMMs do 2 * 128 operations each, and each writes or reads the score,
    2 bytes: the slower of both counts. The row-wise kernels between them move it seven times more:
    softmax reads twice and writes once, its gradient reads two and writes two. What the shift of
    logits takes (train/kernels/attention_shift.py) isn't counted here (two of the GEMMs are 136
    wide), but the H200's share of the roofline was measured with it.
    """
    flops, score_bytes = 2 * 128, 2
    copy_s = score_bytes / copy_bytes
    gemm_s = max(flops / gemm_flops, copy_s)
    return 7 * flops / (7 * gemm_s + 7 * copy_s)


# shares of the data sheet's 989 TFLOP/s and 4.8 TB/s; flash's by its time beside cuDNN's, see
# train/model/attention.py
_H200_FLOPS, _H200_BYTES = 725e12, 3.9e12
_GEMM, _COPY = _H200_FLOPS / 989e12, _H200_BYTES / 4.8e12
_FUSED = {
    "flash4": 568 / 989,
    "cudnn": 488 / 989,
    "flash": 488 / 989 * 10.7 / 18.1,
    "efficient": 131 / 989,
}
# 28.25 ms at 11,440 tokens, 14 L^2 dim operations: bench/records/2026-11-27_attention_h200.md
_H200_GEMM_ATTENTION = 14 * 11_440**2 * 3072 / 28.25e-3
_OF_ROOFLINE = _H200_GEMM_ATTENTION / gemm_attention_flops(_H200_FLOPS, _H200_BYTES)


def _rates(peak_flops: float, peak_bytes: float, attention: dict[str, float]) -> Rates:
    """The H200's shares of these peaks. attention: the fused kernels that run there, each with its
    share of the peak.
    """
    gemm_flops, copy_bytes = peak_flops * _GEMM, peak_bytes * _COPY
    attention_flops = {kernel: peak_flops * share for kernel, share in attention.items()}
    attention_flops["gemm"] = _OF_ROOFLINE * gemm_attention_flops(gemm_flops, copy_bytes)
    return Rates(gemm_flops, attention_flops, copy_bytes)


def _card(
    name: str,
    memory_gib: float,
    has_bfloat16: bool,
    source: str,
    slow: Rates,
    fast: Rates | None,
    link_bytes: float,
    peer_bytes: float,
) -> Card:
    return Card(name, memory_gib, has_bfloat16, source, slow, fast or slow, link_bytes, peer_bytes)


_V100_SLOW = _rates(112e12, 0.9e12, {"efficient": _FUSED["efficient"]})
_V100_FAST = Rates(
    gemm_flops=90e12,
    attention_flops={
        "efficient": 25e12,
        "gemm": gemm_attention_flops(90e12, _V100_SLOW.copy_bytes),
    },
    copy_bytes=_V100_SLOW.copy_bytes,
)
CARDS = (
    _card(
        "V100-PCIE-32GB",
        32,
        has_bfloat16=False,
        source="modelled, see tools/cards.py: GEMMs 82 to 90 TFLOP/s, 0.73 TB/s",
        slow=_V100_SLOW,
        fast=_V100_FAST,
        link_bytes=12e9,
        peer_bytes=10e9,
    ),
    _card(
        "A100-SXM-80GB",
        80,
        has_bfloat16=True,
        source="modelled: data sheet 312 TFLOP/s, 2.0 TB/s; flash as cuDNN on the H200",
        slow=_rates(312e12, 2.0e12, {"flash": _FUSED["cudnn"], "efficient": _FUSED["efficient"]}),
        fast=None,
        link_bytes=24e9,
        peer_bytes=200e9,
    ),
    _card(
        "H100-SXM-80GB",
        80,
        has_bfloat16=True,
        source="modelled: the H200's arithmetic, 3.35 TB/s",
        slow=_rates(989e12, 3.35e12, _FUSED),
        fast=None,
        link_bytes=50e9,
        peer_bytes=300e9,
    ),
    _card(
        "H200",
        139,
        has_bfloat16=True,
        source="rates measured, see bench/README.md",
        slow=_rates(989e12, 4.8e12, _FUSED),
        fast=None,
        link_bytes=50e9,
        peer_bytes=300e9,
    ),
)
