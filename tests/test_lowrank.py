"""The three low-rank products with dropout: Triton kernels, in the interpreter, against their eager twins."""

import pytest
import torch
from torch import Tensor

from train import lowrank, lowrank_kernels

B, L, K = 2, 37, 200  # no multiple of any block
KEY_B = lowrank.dropout_keys(torch.tensor([2**62 + 5, 77]), 4)[3]


def strided(width: int, spare: int, dtype: torch.dtype) -> Tensor:
    """[B, L, width] whose rows lie `spare` elements apart."""
    return torch.randn(B, L, width + spare).to(dtype)[..., :width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_low", "p"), [(8, 0.1), (24, 0.6), (24, 0.0)])
def test_kernels_equal_their_twins(dtype: torch.dtype, num_low: int, p: float) -> None:
    torch.manual_seed(0)
    x_BLK, a_RK = strided(K, num_low, dtype), torch.randn(num_low, K).to(dtype)
    dlow_MR = torch.randn(B * L, num_low + 5).to(dtype)[:, :num_low]
    atol, rtol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 5e-3)
    torch.testing.assert_close(lowrank_kernels.drop(x_BLK, p, KEY_B), lowrank.dropped(x_BLK, p, KEY_B))
    for into, gelu in ((False, False), (True, False), (True, True)):
        low, twin = (torch.zeros(B * L, num_low + 3).to(dtype)[:, :num_low] for _ in range(2))
        copy, twin_copy = (strided(K, num_low, dtype) if into else None for _ in range(2))
        lowrank_kernels.down(x_BLK, a_RK, p, KEY_B, low, copy, gelu)
        lowrank.project_down(x_BLK, a_RK, p, KEY_B, twin, twin_copy, gelu)
        torch.testing.assert_close(low, twin, atol=atol, rtol=rtol)
        if copy is not None and twin_copy is not None:
            torch.testing.assert_close(copy, twin_copy)
    up_BLK = torch.zeros(B, L, K, dtype=dtype)
    lowrank_kernels.up(dlow_MR, a_RK, p, KEY_B, up_BLK)
    torch.testing.assert_close(up_BLK, lowrank.project_up(dlow_MR, a_RK, p, KEY_B, x_BLK.shape), atol=atol, rtol=rtol)
    for gelu in (False, True):
        torch.testing.assert_close(lowrank_kernels.gradient(dlow_MR, x_BLK, p, KEY_B, gelu),
                                   lowrank.gradient_a(dlow_MR, x_BLK, p, KEY_B, gelu), atol=atol, rtol=rtol)
