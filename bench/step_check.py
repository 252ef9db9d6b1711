"""What bench.step proves before it times: every kernel against its eager twin on this card,
gradients in half precision against float32 and PEFT, graphs and recomputation against the plain
pass, and a whole loss curve in half precision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from bench import step_subjects as subjects
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import WAN22, Bucket
from train import flow, optim
from train.activations import plan as remat
from train.config import FlowConfig
from train.kernels import lowrank
from train.kernels import pointwise as elementwise
from train.kernels.pointwise import Rows
from train.lora import adapters as lora
from train.lora.linear import lora_linear_eager
from train.model.wan import TI2V_5B, Projections, Wan, WanConfig, rope_tables
from train.step import MicroStep, prepare

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


def gradients_agree(
    config: WanConfig,
    bucket: Bucket,
    i2v: bool,
    adapters: subjects.Adapters,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
) -> Checks:
    """Our loss and LoRA gradients in `dtype` against diffusers + PEFT in float32, with equal
    weights, no dropout.
    """
    adapters = adapters._replace(dropout=0.0)
    config = msgspec.structs.replace(config, num_layers=2)
    reference = subjects.reference_model(config, device, dtype)
    model = subjects.our_model(reference, config, dtype)
    ours = subjects.attach(model, adapters)
    batch = subjects.make_batch(bucket, i2v, device)
    inputs = prepare(batch, FlowConfig())
    velocity = model(*inputs[:4], subjects.chosen_attention(attention, device, dtype))
    loss = flow.sample_losses(velocity, inputs.target_BCThw, inputs.num_clean_frames_B).mean()
    scale = settled_scale(loss, ours.parameters()) if dtype == torch.float16 else 1.0
    if dtype != torch.float16:
        loss.backward()
    reference.float()
    subjects.peer_step(reference, adapters, torch.float32)
    theirs = {
        name.replace(".default.weight", ""): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    for name, (a, b) in ours.tensors().items():
        theirs[f"{name}.lora_A"].data.copy_(a)
        theirs[f"{name}.lora_B"].data.copy_(b.to(dtype))  # what our GEMMs read
        theirs[f"{name}.lora_A"].data.copy_(a.to(dtype))
    subjects.only_attention("efficient")
    expected = subjects.peer_loss(reference, batch, torch.float32)
    expected.backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad / scale
    worst, total = 0.0, [0.0, 0.0]
    for name, pair in ours.tensors().items():
        for kind, ours_g in zip("AB", pair, strict=True):
            gradient = theirs[f"{name}.lora_{kind}"].grad
            worst = max(worst, relative(ours_g, gradient))
            total[0] += (ours_g - gradient).square().sum().item()
            total[1] += gradient.square().sum().item()
    return {
        "loss": (abs(loss.item() / expected.item() - 1), 1e-3),
        "gradient": ((total[0] / total[1]) ** 0.5, 2e-2),
        "its worst tensor": (worst, 0.1),
    }


def settled_scale(loss: Tensor, parameters: Sequence[torch.nn.Parameter]) -> float:
    """Backward with the loss scale that dynamic scaling comes down to: the largest at which
    nothing overflows.
    """
    for exponent in range(40, 0, -1):
        for parameter in parameters:
            parameter.grad = None
        (loss * 2.0**exponent).backward(retain_graph=True)
        if all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters):
            print(f"  the loss scale settles at 2**{exponent}", flush=True)
            return 2.0**exponent
    raise AssertionError("gradients overflow at every scale")


def same_bits(
    model: Wan,
    adapters: lora.LoRA,
    bucket: Bucket,
    dtype: torch.dtype,
    attention: str,
    plans: dict[str, remat.Kept],
    max_graph_tokens: int,
) -> Checks:
    """Largest difference of the gradients of three accumulated samples, T2V, I2V and T2V, against
    keeping all.
    """
    device = model.scale_shift_table.device
    flat = optim.flatten(adapters.parameters())
    chosen = subjects.chosen_attention(attention, device, dtype)
    batches = [
        subjects.make_batch(bucket, i2v, device, seed)
        for seed, i2v in enumerate((False, True, False))
    ]
    found: Checks = {}
    expected = None
    for name, kept in ({"all": remat.Kept(None, 0.0)} | plans).items():
        run_block = remat.block_runner(
            model, {remat.Shape(1, WAN22.num_tokens(bucket), MAX_TEXT_TOKENS): kept}
        )
        scaler = torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16)
        step = MicroStep(
            model,
            adapters.set_seeds,
            chosen,
            run_block,
            scaler,
            1 / 3,
            max_graph_tokens if name.startswith("graphs") else 0,
        )
        for _ in range(2):  # a graph exists from the second round on
            flat.buffer.zero_()
            for batch in batches:
                step.forward(prepare(batch, FlowConfig()))
                step.backward()
        if expected is None:
            expected = flat.gradient.clone()
        else:
            found[name] = (
                ((flat.gradient - expected).abs().max() / expected.abs().max()).item(),
                0.0,
            )
    return found


def loss_curve(
    dtype: torch.dtype, attention: str, device: torch.device, num_steps: int = 200
) -> Checks:
    """A small model trained for `num_steps` in `dtype` and in float32: the largest difference of
    20-step means.
    """
    config = msgspec.structs.replace(
        TI2V_5B, num_layers=4, num_attention_heads=4, ffn_dim=1024, text_dim=4096
    )
    bucket = Bucket(256, 256, 9)
    curves = []
    for kind in (dtype, torch.float32):
        reference = subjects.reference_model(config, device, kind)
        model = subjects.our_model(reference, config, kind)
        adapters = lora.attach(model, lora.TARGETS, 16, 16.0, 0.1, seed=1)
        flat = optim.flatten(adapters.parameters())
        optimizer = optim.make_optimizer(flat.vector, "adamw", 1e-3, (0.9, 0.999), 1e-8, 0.01)
        scaler = torch.amp.GradScaler(device.type, 65536.0, enabled=kind == torch.float16)
        name = attention if kind == dtype else "efficient"
        step = MicroStep(
            model,
            adapters.set_seeds,
            subjects.chosen_attention(name, device, kind),
            None,
            scaler,
            1.0,
            4096,
        )
        losses = []
        for i in range(num_steps):
            flat.buffer.zero_()
            batch = subjects.make_batch(bucket, i % 3 == 0, device, seed=i % 8)
            losses.append(step.forward(prepare(batch, FlowConfig())).clone())
            step.backward()
            scaler.unscale_(optimizer)
            optim.clip_gradient(flat.gradient, 1.0)
            scaler.step(optimizer)
            scaler.update()
            adapters.refresh()
        curves.append(torch.stack(losses).view(-1, 20).mean(1))
    ours, expected = curves
    assert expected[-1] < 0.95 * expected[0], (
        "the model must learn something, or the comparison says nothing"
    )
    return {
        "largest difference of 20-step means": (
            ((ours - expected).abs() / expected).max().item(),
            1e-2,
        )
    }
