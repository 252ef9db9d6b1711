"""What bench.step proves about our whole step before it times it: gradients in half precision
against float32 and PEFT, graphs and recomputation against the plain pass, and a whole loss curve
in half precision. bench/step_check.py does the same for single kernels.
"""

import gc
from importlib.util import find_spec

import msgspec
import torch
from torch import Tensor

from bench import step_check
from bench import step_subjects as subjects
from bench.our_step import ADAPTERS, Adapters, add_gradients, our_config, our_run, update
from bench.step_check import Checks, relative
from loader.shape import Bucket
from tools.fake.step import random_batch
from train import setup
from train.lora import adapters as lora
from train.model.wan import TI2V_5B, WanConfig
from train.optim import OptimConfig
from train.parallel.mesh import World
from train.run import Run
from train.step import prepare

# name -> (activation_memory, activation_offload, cuda_graph_tokens)
WAYS = {
    "all": ("all", False, 0),
    "block": ("block", False, 0),
    "0.1 GiB": ("0.1GiB", False, 0),
    "offload": ("block", True, 0),
    "0.1 GiB, offload": ("0.1GiB", True, 0),
    "graphs": ("all", False, 4096),
    "graphs, 0.1 GiB": ("0.1GiB", False, 4096),
}


def check(
    config: WanConfig,
    bucket: Bucket,
    dtype: torch.dtype,
    attention: str,
    cases: dict[str, tuple[str, bool]],
    device: torch.device,
    tensor_cores: bool,
) -> dict[str, Checks]:
    """Every check, by name. `cases`: name -> (of ADAPTERS, whether image-to-video)."""
    found = {
        "kernels": step_check.kernels_agree(device, dtype, tensor_cores),
        "linear": step_check.linear_agrees(device, dtype, False, tensor_cores),
        "200 steps": loss_curve(dtype, attention, device, tensor_cores),
    }
    if find_spec("bitsandbytes"):
        found["linear, NF4"] = step_check.linear_agrees(device, dtype, True, tensor_cores)
    for case, (adapters, i2v) in cases.items():
        found[f"2 blocks, {case}"] = gradients_agree(
            config, bucket, i2v, ADAPTERS[adapters], dtype, attention, device, tensor_cores
        )
        free_memory()
    # cuDNN's backward pass is not deterministic
    bitwise = "flash" if attention == "auto" else attention
    shallow = msgspec.structs.replace(config, num_layers=4)
    found["same bits"] = same_bits(
        shallow, Bucket(832, 480, 9), dtype, bitwise, device, tensor_cores
    )
    return found


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def gradients_agree(
    config: WanConfig,
    bucket: Bucket,
    i2v: bool,
    adapters: Adapters,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    tensor_cores: bool,
) -> Checks:
    """Our loss and LoRA gradients in `dtype` against diffusers + PEFT in float32, with equal
    weights, no dropout.
    """
    adapters = adapters._replace(dropout=0.0)
    config = msgspec.structs.replace(config, num_layers=2)
    reference = subjects.reference_model(config, device, dtype)
    model = subjects.our_model(reference, config, dtype)
    run = our_run(our_config(adapters, dtype, attention), bucket, model, tensor_cores=tensor_cores)
    batch = random_batch(bucket, device, is_i2v=[i2v])
    loss = run.micro_step.loss(prepare(batch, run.laws))
    scale = settled_scale(loss, run) if dtype == torch.float16 else 1.0
    if dtype != torch.float16:
        loss.backward()

    reference.float()
    subjects.peer_step(reference, adapters, torch.float32)
    theirs = {
        name.replace(".default.weight", ""): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    for name, (a, b) in run.adapters.tensors().items():
        theirs[f"{name}.lora_A"].data.copy_(a.to(dtype))  # what our GEMMs read
        theirs[f"{name}.lora_B"].data.copy_(b.to(dtype))
    subjects.only_attention("efficient")
    expected = subjects.peer_loss(reference, batch, torch.float32)
    expected.backward()

    # the adapters' tensors become their gradients, which so have names
    run.flat.vector.data.copy_(run.flat.gradient / scale)
    worst, squared_error, squared_norm = 0.0, 0.0, 0.0
    for name, pair in run.adapters.tensors().items():
        for kind, ours in zip("AB", pair, strict=True):
            gradient = theirs[f"{name}.lora_{kind}"].grad
            worst = max(worst, relative(ours, gradient))
            squared_error += (ours - gradient).square().sum().item()
            squared_norm += gradient.square().sum().item()
    return {
        "loss": (abs(loss.item() / expected.item() - 1), 1e-3),
        "gradient": ((squared_error / squared_norm) ** 0.5, 2e-2),
        "its worst tensor": (worst, 0.1),
    }


def settled_scale(loss: Tensor, run: Run) -> float:
    """Backward with the loss scale that dynamic scaling comes down to: the largest at which
    nothing overflows.
    """
    for exponent in range(40, 0, -1):
        run.flat.buffer.zero_()
        (loss * 2.0**exponent).backward(retain_graph=True)
        if bool(run.flat.gradient.isfinite().all()):
            print(f"  the loss scale settles at 2**{exponent}", flush=True)
            return 2.0**exponent
    raise AssertionError("gradients overflow at every scale")


def same_bits(
    config: WanConfig,
    bucket: Bucket,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    tensor_cores: bool,
) -> Checks:
    """Largest difference of the gradients of three accumulated samples, T2V, I2V and T2V, between
    each of WAYS and the first, which saves everything.
    """
    reference = subjects.reference_model(config, device, dtype)
    batches = [
        random_batch(bucket, device, is_i2v=[is_i2v], seed=seed)
        for seed, is_i2v in enumerate((False, True, False))
    ]
    found: Checks = {}
    expected = None
    for name, (memory, offload, graph_tokens) in WAYS.items():
        run_config = our_config(
            ADAPTERS["r32"],
            dtype,
            attention,
            global_batch=len(batches),
            activation_memory=memory,
            activation_offload=offload,
            cuda_graph_tokens=graph_tokens,
            deterministic=True,
        )
        model = subjects.our_model(reference, config, dtype)
        run = our_run(run_config, bucket, model, tensor_cores=tensor_cores)
        for _ in range(2):  # a graph exists from the second round on
            add_gradients(run, batches)
        if expected is None:
            expected = run.flat.gradient.clone()
        else:
            difference = (run.flat.gradient - expected).abs().max() / expected.abs().max()
            found[name] = (difference.item(), 0.0)
    torch.use_deterministic_algorithms(False)  # `deterministic` set it for the whole process
    return found


def loss_curve(
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    tensor_cores: bool,
    num_steps: int = 200,
) -> Checks:
    """A small model trained for `num_steps` in `dtype` and in float32: the largest difference of
    20-step means.
    """
    small = msgspec.structs.replace(
        TI2V_5B, num_layers=4, num_attention_heads=4, ffn_dim=1024, text_dim=4096
    )
    bucket = Bucket(256, 256, 9)
    curves = []
    for kind in (dtype, torch.float32):
        reference = subjects.reference_model(small, device, kind)
        model = subjects.our_model(reference, small, kind)
        config = our_config(
            Adapters(lora.TARGETS, 16, 0.1),
            kind,
            attention if kind == dtype else "efficient",
            optim=OptimConfig(lr=1e-3, loss_scale=65536.0, clip_norm=1.0),
        )
        run = setup.build(
            config, World(0, 1, device), [bucket], model=model, tensor_cores=tensor_cores
        )
        losses = []
        for i in range(num_steps):
            batch = random_batch(bucket, device, is_i2v=[i % 3 == 0], seed=i % 8)
            losses.append(add_gradients(run, [batch]).clone())  # a graph's loss is overwritten
            update(run)
        curves.append(torch.stack(losses).view(-1, 20).mean(1))
    ours, expected = curves
    assert expected[-1] < 0.95 * expected[0], (
        "the model must learn something, or the comparison says nothing"
    )
    largest = ((ours - expected).abs() / expected).max().item()
    return {"largest difference of 20-step means": (largest, 1e-2)}
