"""The rates that a training step reaches on the cards that we know.

Those of the H200 are what the kernels of a step reach there at 1280x704x49 (tools.profile_step,
bench/README.md). The other cards' are their data sheets' peaks times the share of its peak that
the H200 reached, so times for them are *modelled* and may be far off, above all V100's, whose
attention kernel is another one.
"""

from typing import NamedTuple

# shares of the data sheet's 989 TFLOP/s and 4.8 TB/s; flash's by its time beside cuDNN's, see
# train/model/attention.py
_GEMM = 725 / 989
_ATTENTION = {
    "flash4": 568 / 989,
    "cudnn": 488 / 989,
    "flash": 488 / 989 * 10.7 / 18.1,
    "efficient": 131 / 989,
}
_COPY = 3.9 / 4.8


class Card(NamedTuple):
    """Rates per second: operations of half-precision GEMMs; of each attention kernel that runs
    there (forward and backward together, counting 3.5 times the forward); bytes moved.

    The kernel that "auto" takes comes first in `attention_flops`; with `deterministic` that is
    flash, where it runs.
    """

    name: str
    memory_gib: float
    gemm_flops: float
    attention_flops: dict[str, float]
    copy_bytes: float
    has_bfloat16: bool
    # where the rates come from
    source: str


def _card(
    name: str,
    memory_gib: float,
    *,
    peak_flops: float,
    peak_bytes: float,
    attention: dict[str, float],
    has_bfloat16: bool,
    source: str,
) -> Card:
    """`attention`: the kernels that run there, each with the share of the peak that it reaches."""
    return Card(
        name=name,
        memory_gib=memory_gib,
        gemm_flops=peak_flops * _GEMM,
        attention_flops={kernel: peak_flops * share for kernel, share in attention.items()},
        copy_bytes=peak_bytes * _COPY,
        has_bfloat16=has_bfloat16,
        source=source,
    )


CARDS = (
    _card(
        "V100-PCIE-32GB",
        32,
        peak_flops=112e12,
        peak_bytes=0.9e12,
        attention={"efficient": _ATTENTION["efficient"]},
        has_bfloat16=False,
        source="modelled: data sheet 112 TFLOP/s fp16, 0.9 TB/s",
    ),
    _card(
        "A100-SXM-80GB",
        80,
        peak_flops=312e12,
        peak_bytes=2.0e12,
        attention={"flash": _ATTENTION["cudnn"], "efficient": _ATTENTION["efficient"]},
        has_bfloat16=True,
        source="modelled: data sheet 312 TFLOP/s, 2.0 TB/s; flash as cuDNN on the H200",
    ),
    _card(
        "H100-SXM-80GB",
        80,
        peak_flops=989e12,
        peak_bytes=3.35e12,
        attention=_ATTENTION,
        has_bfloat16=True,
        source="modelled: the H200's arithmetic, 3.35 TB/s",
    ),
    _card(
        "H200",
        139,
        peak_flops=989e12,
        peak_bytes=4.8e12,
        attention=_ATTENTION,
        has_bfloat16=True,
        source="rates measured, see bench/README.md",
    ),
)
