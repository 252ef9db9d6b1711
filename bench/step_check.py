"""What bench.step proves about single kernels before it times: each Triton kernel and each adapted
GEMM against its reference implementation, on this card at the real widths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.kernels import lowrank, pointwise
from train.kernels.dropout import Dropout, dropout_keys
from train.kernels.layout import Rows
from train.lora import adapters as lora
from train.lora.linear import lora_linear_eager
from train.model.wan import TI2V_5B, Projections, rope_tables

Checks = dict[str, tuple[float, float]]  # what was measured, and the most that it may be


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def kernels_agree(
    device: torch.device, dtype: torch.dtype, tensor_cores: bool, length: int = 2303
) -> Checks:
    """Worst relative difference between each Triton kernel and its reference implementation,
    forward and gradients, real widths.
    """
    dim, ffn, num_low, heads = TI2V_5B.dim, TI2V_5B.ffn_dim, 32, TI2V_5B.num_attention_heads
    torch.manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind).requires_grad_()

    def rows() -> Rows:
        return Rows(
            torch.randn(2, 2, dim, device=device), torch.tensor([0, length // 2], device=device)
        )

    def worst(
        functions: Sequence[Callable[..., Any]], inputs: Sequence[Tensor], *rest: Any
    ) -> float:
        results = []
        for function in functions:
            out = function(*inputs, *rest)
            outs = out if isinstance(out, tuple) else (out,)
            generator = torch.Generator(device).manual_seed(1)
            grads = [
                torch.randn(o.shape, device=device, generator=generator).to(o.dtype) for o in outs
            ]
            results.append([*outs, *torch.autograd.grad(outs, inputs, grads)])
        return max(relative(*pair) for pair in zip(*results, strict=True))

    x, y = random(2, length, dim, kind=torch.float32), random(2, length, dim)
    gate, shift, scale = rows(), rows(), rows()
    gelu = (pointwise.gelu_tanh, pointwise.gelu_tanh_eager)
    rope = rope_tables(1, 47, 49, dim // heads, device)
    differences = {
        "residual_norm": worst(
            (pointwise.residual_norm, pointwise.residual_norm_eager),
            (x, y),
            gate,
            shift,
            scale,
            1e-6,
            dtype,
            48,
        ),
        "split_norm_rope": worst(
            (pointwise.split_norm_rope, pointwise.split_norm_rope_eager),
            (random(2, length, 3 * dim),),
            (torch.randn(dim, device=device), torch.randn(dim, device=device)),
            rope,
            heads,
            1e-6,
        ),
        "gelu_tanh": worst(gelu, (random(2, length, ffn),), 48),
    }
    # the slope cancels where u is large
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    every = every[every.abs() < 1e4].view(1, 1, -1).requires_grad_()
    differences["gelu_tanh, every value below 10,000"] = worst(gelu, (every,), 0)
    keys_B = dropout_keys(torch.tensor([2**62 + 5, 77], device=device), 3)[2]
    for width in (dim, ffn):
        wide = torch.randn(2, length, width + num_low, device=device).to(dtype)[..., :width]
        a = torch.randn(num_low, width, device=device).to(dtype)
        dlow = torch.randn(2 * length, num_low, device=device).to(dtype)
        dropout = Dropout(0.1, keys_B)
        ours, expected = lowrank.drop(wide, dropout), lowrank.drop_eager(wide, dropout)
        assert torch.equal(ours != 0, expected != 0)
        for p in (0.0, 0.1):
            dropout = Dropout(p, keys_B)
            results = [
                low_rank_products(CHOSEN, wide, a, dlow, dropout, tensor_cores=tensor_cores),
                low_rank_products(EAGER, wide, a, dlow, dropout),
            ]
            differences[f"low-rank {width}, dropout {p}"] = max(
                relative(*pair) for pair in zip(*results, strict=True)
            )
    return {name: (difference, 5e-3) for name, difference in differences.items()}


CHOSEN = (lowrank.project_down, lowrank.project_up, lowrank.gradient_a)
EAGER = (lowrank.project_down_eager, lowrank.project_up_eager, lowrank.gradient_a_eager)


def low_rank_products(
    functions: tuple[Callable[..., Any], ...],
    x: Tensor,
    a: Tensor,
    dlow: Tensor,
    dropout: Dropout,
    **options: bool,
) -> list[Tensor]:
    """Everything that the three functions compute, with and without copying and GELU."""
    project_down, project_up, gradient_a = functions
    found: list[Tensor] = []
    for copy, gelu in (
        (None, False),
        (torch.empty_like(x), False),
        (torch.empty_like(x), True),
    ):
        low = torch.empty_like(dlow)
        saved = torch.empty_like(low) if gelu else None
        project_down(x, a, dropout, low, copy_BLK=copy, gelu=gelu, saved_MR=saved, **options)
        found += [tensor for tensor in (low, copy, saved) if tensor is not None]
    found.append(project_up(dlow, a, dropout, x.shape, **options))
    gelu_grad = torch.ones(x.shape, device=x.device, dtype=x.dtype)
    for grad in (None, gelu_grad):
        found.append(gradient_a(dlow, x, dropout, 2.0, gelu_grad_BLK=grad, **options))
    return [*found, gelu_grad]


def linear_agrees(
    device: torch.device, dtype: torch.dtype, nf4: bool, tensor_cores: bool
) -> Checks:
    """Worst relative difference between the adapted GEMMs of a block (q/k/v, ffn.down with its
    GELU), with dropout, and their definition in float32 with the same weights; with `nf4` those
    are as bitsandbytes unpacks them.
    """
    found: Checks = {}
    config, length = TI2V_5B, 2303
    for names, width, gelu in (
        (("attn1.to_q", "attn1.to_k", "attn1.to_v"), config.dim, False),
        (("ffn.net.2",), config.ffn_dim, True),
    ):
        torch.manual_seed(0)
        with torch.device(device):
            base = Projections(width, dict.fromkeys(names, config.dim))
        for parameter in (base.weight, base.bias):
            parameter.data = (
                (torch.randn_like(parameter) / width**0.5).to(dtype).requires_grad_(False)
            )
        module = lora.LoRAProjections(base, names, 32, 64.0, 0.1, 1, nf4, tensor_cores)
        for parameter in (module.a_RK, module.b_NR):
            # what the copies can hold
            parameter.data.copy_(0.05 * torch.randn_like(parameter).to(dtype))
        adapters = lora.LoRA({0: [module]}, 32, 64.0, names, num_blocks=1)
        adapters.set_seeds(torch.tensor([2**62 + 5, 77], device=device))
        source = torch.randn(2, length, width, device=device).to(dtype)
        dy = torch.randn(2, length, len(names) * config.dim, device=device).to(dtype)
        weight = module.weight if module.nf4 is None else module.nf4.dense()
        b_NR = weight[:, width : width + module.num_padding].float().requires_grad_()
        results = []
        for ours in (True, False):
            x = source.clone().requires_grad_() if ours else source.float().requires_grad_()
            if ours:
                y = module(x, gelu=gelu)
            else:
                value = pointwise.gelu_tanh_eager(x) if gelu else x
                y = lora_linear_eager(
                    value,
                    weight[:, :width].float(),
                    module.bias.float(),
                    module.a_RK,
                    b_NR,
                    module.scale,
                    Dropout(0.1, module.key_B),
                )
            inputs = [x, module.a_RK, module.b_NR if ours else b_NR]
            results.append([y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
        for parameter, gradient in zip((module.a_RK, module.b_NR), results[0][2:], strict=True):
            parameter.grad, parameter.adds_in_place = gradient.clone(), True
        module(source.clone().requires_grad_(), gelu=gelu).backward(dy)
        results[0][2:] = [0.5 * p.grad for p in (module.a_RK, module.b_NR) if p.grad is not None]
        whole = results[1][-1]
        results[1][-1] = torch.cat(
            [whole[first:end, i * 32 : (i + 1) * 32] for i, (first, end) in enumerate(module.spans)]
        )
        found["GELU and ffn.down" if gelu else "q/k/v"] = (
            max(relative(*pair) for pair in zip(*results, strict=True)),
            1e-2,
        )
    return found
