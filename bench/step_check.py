"""What bench.step proves about single kernels before it times: each Triton kernel and each adapted
GEMM against its reference implementation, on this card at the real widths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from train.kernels import lowrank
from train.kernels import pointwise as elementwise
from train.kernels.pointwise import Rows
from train.lora import adapters as lora
from train.lora.linear import lora_linear_eager
from train.model.wan import TI2V_5B, Projections, rope_tables

Checks = dict[str, tuple[float, float]]  # what was measured, and the most that it may be


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def kernels_agree(device: torch.device, dtype: torch.dtype, length: int = 2303) -> Checks:
    """Worst relative difference between each Triton kernel and its eager twin, forward and
    gradients, real widths.
    """
    dim, ffn, num_low, heads = TI2V_5B.dim, TI2V_5B.ffn_dim, 32, TI2V_5B.num_attention_heads
    torch.manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(kind).requires_grad_()

    def rows() -> Rows:
        return Rows(
            torch.randn(2, 2, dim, device=device), torch.tensor([0, length // 2], device=device)
        )

    def worst(function: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any) -> float:
        results = []
        for kernels in (True, False):
            out = function(*inputs, *rest, kernels=kernels)
            outs = out if isinstance(out, tuple) else (out,)
            generator = torch.Generator(device).manual_seed(1)
            grads = [
                torch.randn(o.shape, device=device, generator=generator).to(o.dtype) for o in outs
            ]
            results.append([*outs, *torch.autograd.grad(outs, inputs, grads)])
        return max(relative(ours, twin) for ours, twin in zip(*results, strict=True))

    x, y = random(2, length, dim, kind=torch.float32), random(2, length, dim)
    gate, shift, scale = rows(), rows(), rows()
    rope = rope_tables(1, 47, 49, dim // heads, device)
    differences = {
        "residual_norm": worst(
            elementwise.residual_norm, (x, y), gate, shift, scale, 1e-6, dtype, 48
        ),
        "split_norm_rope": worst(
            elementwise.split_norm_rope,
            (random(2, length, 3 * dim),),
            (torch.randn(dim, device=device), torch.randn(dim, device=device)),
            rope,
            heads,
            1e-6,
        ),
        "gelu_tanh": worst(elementwise.gelu_tanh, (random(2, length, ffn),), 48),
    }
    # the slope cancels where u is large
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    every = every[every.abs() < 1e4].view(1, 1, -1).requires_grad_()
    differences["gelu_tanh, every value below 10,000"] = worst(elementwise.gelu_tanh, (every,), 0)
    keys_B = lowrank.dropout_keys(torch.tensor([2**62 + 5, 77], device=device), 3)[2]
    for width in (dim, ffn):
        wide = torch.randn(2, length, width + num_low, device=device).to(dtype)[..., :width]
        a, dlow = (
            torch.randn(num_low, width, device=device).to(dtype),
            torch.randn(2 * length, num_low, device=device).to(dtype),
        )
        assert torch.equal(
            lowrank.dropped(wide, 0.1, keys_B) != 0, lowrank.dropped(wide, 0.1, keys_B, False) != 0
        )
        for p in (0.0, 0.1):
            results = []
            for kernels in (True, False):
                found = []
                for into, gelu in (
                    (None, False),
                    (torch.empty_like(wide), False),
                    (torch.empty_like(wide), True),
                ):
                    low = torch.empty(2 * length, num_low, device=device, dtype=dtype)
                    kept = torch.empty_like(low) if gelu else None
                    lowrank.project_down(wide, a, p, keys_B, low, into, gelu, kept, kernels)
                    found += [tensor for tensor in (low, into, kept) if tensor is not None]
                gelu_grad = torch.ones(wide.shape, device=device, dtype=dtype)
                results.append(
                    [
                        *found,
                        lowrank.project_up(dlow, a, p, keys_B, wide.shape, kernels),
                        *(
                            lowrank.gradient_a(dlow, wide, p, keys_B, 2.0, grad, None, kernels)
                            for grad in (None, gelu_grad)
                        ),
                        gelu_grad,
                    ]
                )
            differences[f"low-rank {width}, dropout {p}"] = max(
                relative(*pair) for pair in zip(*results, strict=True)
            )
    return {name: (difference, 5e-3) for name, difference in differences.items()}


def linear_agrees(device: torch.device, dtype: torch.dtype, nf4: bool) -> Checks:
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
        module = lora.LoRAProjections(base, names, 32, 64.0, 0.1, layer=1, nf4=nf4)
        for parameter in (module.a_RK, module.b_NR):
            # what the copies can hold
            parameter.data.copy_(0.05 * torch.randn_like(parameter).to(dtype))
        adapters = lora.LoRA({0: [module]}, 32, 64.0, names)
        adapters.set_seeds(torch.tensor([2**62 + 5, 77], device=device))
        source = torch.randn(2, length, width, device=device).to(dtype)
        dy = torch.randn(2, length, len(names) * config.dim, device=device).to(dtype)
        weight = module.weight if module.nf4 is None else module.nf4.dense()
        b_NR = weight[:, width : width + module.num_spare].float().requires_grad_()
        results = []
        for ours in (True, False):
            x = source.clone().requires_grad_() if ours else source.float().requires_grad_()
            if ours:
                y = module(x, gelu=gelu)
            else:
                value = elementwise.gelu_tanh(x, kernels=False) if gelu else x
                y = lora_linear_eager(
                    value,
                    weight[:, :width].float(),
                    module.bias.float(),
                    module.a_RK,
                    b_NR,
                    module.scale,
                    0.1,
                    module.key_B,
                )
            inputs = [x, module.a_RK, module.b_NR if ours else b_NR]
            results.append([y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
        for parameter, gradient in zip((module.a_RK, module.b_NR), results[0][2:], strict=True):
            parameter.grad, parameter.adds_in_place = gradient.clone(), True  # type: ignore[attr-defined]
        module(source.clone().requires_grad_(), gelu=gelu).backward(dy)
        results[0][2:] = [0.5 * p.grad for p in (module.a_RK, module.b_NR) if p.grad is not None]
        whole = results[1][-1]
        results[1][-1] = torch.cat(
            [
                whole[first:end, i * 32 : (i + 1) * 32]
                for i, (first, end) in enumerate(module.blocks)
            ]
        )
        found["GELU and ffn.down" if gelu else "q/k/v"] = (
            max(relative(*pair) for pair in zip(*results, strict=True)),
            1e-2,
        )
    return found
