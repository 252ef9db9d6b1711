"""What bench.step times: our step, the same on the frozen base, diffusers with PEFT, and the floor.

All have the same random weights of the real size, the same sample and noise, and do a whole
optimizer step: noise, forward, loss, backward, clipping, AdamW. The floor does only what no
implementation of this model can leave out: the GEMMs of our step, adapters included (dlow and dB
by one kernel where our step has it), and the attention calls, forward and backward, nothing
recomputed, on random values, one block's buffers used again for the next.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from bench.our_step import Adapters, add_gradients, update
from loader.batch import Batch
from loader.shape import WAN22
from train import flow
from train.activations import plan as remat
from train.activations.runner import block_runner
from train.activations.sizes import Shape
from train.flow import NoiseLaws
from train.kernels import lowrank
from train.lora import adapters as lora
from train.model.attention import Attention
from train.model.load import build_transformer
from train.model.wan import Block, Projections, Wan, WanConfig
from train.run import Run
from train.step import MicroStep, prepare

# as diffusers loads it
KEEP_FLOAT32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
Step = Callable[[Batch], Tensor]  # a whole optimizer step; returns the loss


def reference_model(config: WanConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' transformer with random weights, in the dtypes in which diffusers would load
    it.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    for name, parameter in model.named_parameters():
        if set(name.split(".")).isdisjoint(KEEP_FLOAT32):
            parameter.data = parameter.data.to(dtype)
    torch.cuda.empty_cache()
    return model.requires_grad_(False)


def our_model(reference: Any, config: WanConfig, dtype: torch.dtype) -> Wan:
    state = {name: value for name, value in reference.state_dict().items() if "lora" not in name}
    state = {name.replace(".base_layer", ""): value for name, value in state.items()}
    device = next(iter(state.values())).device
    return build_transformer(
        config, state.keys(), state.__getitem__, device, dtype, "the random reference"
    )


def our_step(run: Run) -> Step:
    """What train/main.py does in a step."""

    def step(batch: Batch) -> Tensor:
        loss = add_gradients(run, [batch])
        update(run)
        return loss

    return step


def frozen_step(
    model: Wan,
    attention: Attention,
    shape: Shape,
    plan: remat.ShapePlan,
    max_graph_tokens: int,
) -> Step:
    """Forward and backward of the base alone; the patch embedding's bias keeps the gradient alive
    through block 0.
    """
    device = model.scale_shift_table.device
    bias = model.patch_embedding.bias.requires_grad_(True)
    bias.grad = torch.zeros_like(bias)
    micro_step = MicroStep(
        model,
        set_seeds=lambda seeds_B, first_token: None,
        attention=attention,
        run_block=block_runner(model, {shape: plan}),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        global_batch=shape.batch,
        max_graph_tokens=max_graph_tokens,
    )

    def step(batch: Batch) -> Tensor:
        losses_B = micro_step.forward(prepare(batch, NoiseLaws()))
        micro_step.backward()
        return losses_B.mean()

    return step


def peer_step(reference: Any, adapters: Adapters, dtype: torch.dtype) -> Step:
    """diffusers + PEFT. LoRA stays in the compute dtype, which is the fastest; float16 uses a
    fixed loss scale.
    """
    reference.add_adapter(
        LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.rank,
            lora_dropout=adapters.dropout,
            target_modules=list(adapters.targets),
        )
    )
    parameters = [p for p in reference.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    scale = 1024.0 if dtype == torch.float16 else 1.0

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = peer_loss(reference, batch, dtype)
        (loss * scale).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1 / scale)
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        return loss.detach()

    return step


def peer_loss(reference: Any, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The same noise and timestep as `prepare` gives; TI2V-5B's I2V as diffusers takes it, with a
    timestep per token.
    """
    inputs = prepare(batch, NoiseLaws())
    timestep = inputs.t_BR[:, 1]
    if batch.is_i2v[0] and batch.given_BCTHW is None:
        timestep = timestep[:, None].repeat(1, WAN22.num_tokens(batch.bucket))
        timestep[:, : WAN22.num_tokens(batch.bucket) // WAN22.latent_shape(batch.bucket)[1]] = 0
    velocity = reference(
        inputs.latent_BCThw.to(dtype), timestep, inputs.text_BSD.to(dtype), return_dict=False
    )[0]
    return flow.sample_losses(
        velocity.float(), inputs.target_BCThw, inputs.num_clean_frames_B
    ).mean()


def compile_blocks(reference: Any) -> list[Any]:
    """Compile the blocks; returns what `use_compiled` needs to switch between compiled and
    eager.
    """
    for block in reference.blocks:
        block.compile(dynamic=False)
    return [block._compiled_call_impl for block in reference.blocks]


def use_compiled(reference: Any, compiled: list[Any] | None) -> None:
    for i, block in enumerate(reference.blocks):
        block._compiled_call_impl = compiled[i] if compiled else None


def floor_step(model: Wan, shape: Shape, dtype: torch.dtype, attention: Attention) -> Step:
    """The GEMMs and attention calls of one step of `model`, adapters included, and nothing else."""
    device, config = model.scale_shift_table.device, model.config
    batch, length, text_length = shape[:3]
    dim, heads = config.dim, config.num_attention_heads
    buffers: dict[tuple[int, ...], Tensor] = {}

    def buffer(*shape: int) -> Tensor:
        if shape not in buffers:
            buffers[shape] = torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
        return buffers[shape]

    def gemms(index: int, block: Block) -> None:
        for parent in (block.attn1, block.attn2, block.ffn):
            for name, module in parent.named_children():
                assert isinstance(module, Projections | lora.LoRAProjections)
                weight, rows = module.weight, batch * (text_length if name == "kv" else length)
                num_out, total = weight.shape
                width = total - module.num_padding
                x, dy = buffer(rows, total), buffer(rows, num_out)
                # the text and the first block's input do not
                needs_dx = name != "kv" and (index or name != "qkv")
                F.linear(x, weight, module.bias)
                if isinstance(module, lora.LoRAProjections):
                    low = x[:, :width] @ module.a.T
                    # reads dy once if it can
                    low, _ = lowrank.through_b(
                        dy,
                        low,
                        weight[:, width:],
                        module.spans,
                        tensor_cores=module.tensor_cores,
                    )
                    torch.mm(low.T, x[:, :width], out_dtype=torch.float32)
                    if needs_dx:
                        dx = low @ module.a
                        torch.addmm(dx, dy, weight[:, :width], out=dx)
                elif needs_dx:
                    torch.mm(dy, weight)

    def attentions() -> None:
        q = buffer(batch, length, heads, dim // heads)
        out = buffer(batch, length, heads, dim // heads).transpose(1, 2)
        for num_keys in (length, text_length):
            k = buffer(batch, num_keys, heads, dim // heads)
            v = buffer(batch, num_keys, heads, dim // heads)
            qkv = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
            torch.autograd.grad(attention(*qkv), qkv, out)

    def step(_: Batch) -> Tensor:
        with torch.no_grad():
            for index, block in enumerate(model.blocks):
                assert isinstance(block, Block)
                gemms(index, block)
                with torch.enable_grad():
                    attentions()
        return torch.zeros((), device=device)

    return step


def only_attention(name: str) -> None:
    """Let torch choose no other attention kernel than this one, for the peers."""
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(name == "efficient")
    torch.backends.cuda.enable_math_sdp(name == "math")


def graphed(step: Step, batch: Batch) -> Step:
    """The same work as one CUDA graph: at small shapes the floor is what the GPU needs, not what
    launching takes.
    """
    step(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(batch)

    def replay(_: Batch, keep: Step = step) -> Tensor:  # the graph reads tensors that `step` owns
        graph.replay()
        return loss

    return replay
