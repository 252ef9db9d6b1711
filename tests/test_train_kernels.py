"""The whole model through the Triton kernels, in Triton's interpreter on the CPU (conftest.py)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from train import optim
from train.kernels import lowrank, pointwise_launch
from train.kernels.layout import Rows, has_padding, pad_rows
from train.lora import adapters as lora
from train.model import wan
from train.model.attention import choose_attention
from train.model.load import load_transformer


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run, whatever the device."""

    def residual_norm(
        x_BLD: Tensor,
        y_BLD: Tensor | None,
        gate: Rows | None,
        shift: Rows,
        scale: Rows,
        eps: float,
        dtype: torch.dtype,
        num_padding: int = 0,
    ) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = pointwise_launch.ResidualNorm.apply(
            x_BLD, y_BLD, gate, shift, scale, eps, dtype, num_padding
        )
        return out

    def gelu_tanh(x_BLK: Tensor, num_padding: int = 0) -> Tensor:
        out: Tensor = pointwise_launch.Gelu.apply(x_BLK, num_padding)
        return out

    monkeypatch.setattr(wan, "residual_norm", residual_norm)
    monkeypatch.setattr(wan, "split_norm_rope", pointwise_launch.NormRope.apply)
    monkeypatch.setattr(wan, "gelu_tanh", gelu_tanh)
    monkeypatch.setattr(lowrank, "has_kernels", lambda *_: True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_the_whole_model_is_the_same_through_the_kernels(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: every kernel between the GEMMs and of the adapters, which are written behind
    their inputs and, with dropout, add two gradients up where they lie; T2V and I2V.
    """
    latent, text = torch.randn(2, 48, 3, 4, 4), torch.randn(2, 3, 32)
    attention = choose_attention("math", torch.device("cpu"), torch.float32).attention

    def with_padding(q: Tensor, k: Tensor, v: Tensor, num_padding: int) -> Tensor:
        """As flash4 does it."""
        out_BLHE = attention(q, k, v).transpose(1, 2)
        out_BLD = pad_rows(out_BLHE.flatten(2), num_padding)
        out = out_BLD.unflatten(2, out_BLHE.shape[2:]).transpose(1, 2)
        # as wan.attend makes it
        assert has_padding(out.transpose(1, 2).flatten(2), num_padding)
        return out

    results = []
    for through_kernels in (False, True):
        if through_kernels:
            as_on_a_gpu(monkeypatch)
        model = load_transformer(tiny_checkpoint, torch.device("cpu"), torch.float32)
        adapters = lora.attach(model, lora.TARGETS, 8, 20.0, dropout=0.1, seed=1)
        for _, b in adapters.tensors().values():
            b.normal_(generator=torch.Generator().manual_seed(0))
        optim.flatten(adapters.parameters())
        adapters.refresh()
        adapters.set_seeds(torch.tensor([2**62 + 5, 77]))
        for _ in range(2):
            velocity = model(
                latent,
                torch.tensor([[0.0, 700.0], [0.0, 300.0]]),
                torch.tensor([0, 1]),
                text,
                with_padding if through_kernels else attention,
            )
            velocity.square().mean().backward()
        results.append(
            (velocity.detach(), *(p.grad for p in adapters.parameters() if p.grad is not None))
        )
    assert len(results[0]) == 1 + len(adapters.parameters())
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
