"""TrainConfig: everything that decides a training run, one TOML file. Defaults are those of the
users' V100 pair.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from train.flow import TimestepDistribution
from train.model.attention import AttentionName

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Meta(ge=0.0, lt=1.0)]


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """path: a diffusers folder (Wan-AI/Wan2.2-TI2V-5B-Diffusers). dtype: of GEMM inputs; on a
    V100 float16.
    """

    path: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    attention: AttentionName = "auto"


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """datasets: folders or URLs with a manifest.json. weights: each one's share of the batches
    (default: by size).

    condition: where the clean first frame of I2V comes from. max_damaged: so many samples of each
    dataset may a rank find damaged and replace, from its start on; at one more the run stops.
    cache_dir: keeps what was read from URLs, shared by the ranks of a host; empty: none.
    """

    datasets: Annotated[list[str], Meta(min_length=1)]
    weights: list[float] = []
    condition: Literal["latent", "raw"] = "latent"
    i2v_share: Share = 0.4
    caption_dropout: Share = 0.1
    num_threads: Positive = 4
    max_ahead: Positive = 4
    max_damaged: Annotated[int, Meta(ge=0)] = 16
    cache_dir: str = ""
    cache_gib: Annotated[float, Meta(gt=0.0)] = 64.0


class LoRAConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As in PEFT. init: a LoRA file (diffusers keys) to go on from; empty: fresh adapters. base:
    how the frozen weights of the layers that have adapters are held: "dense" in model.dtype,
    "nf4" in a quarter of that (QLoRA).
    """

    targets: list[str] = msgspec.field(
        default_factory=lambda: [
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn2.to_q",
            "attn2.to_k",
            "attn2.to_v",
        ]
    )
    rank: Positive = 16
    alpha: Annotated[float, Meta(gt=0.0)] = 16.0
    dropout: BelowOne = 0.0
    init: str = ""
    base: Literal["dense", "nf4"] = "dense"


class FlowConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """shift: 5 at 720p, 3 at 480p."""

    shift: Annotated[float, Meta(gt=0.0)] = 5.0
    timesteps: TimestepDistribution = "uniform"


class OptimConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """clip_norm: of the whole gradient, 0 for none. loss_scale: the first one, float16 only: too
    high, it is halved in as many steps as it takes; too low, small gradients vanish until it has
    grown, which takes thousands.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: Annotated[float, Meta(gt=0.0)] = 1e-4
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    clip_norm: Annotated[float, Meta(ge=0.0)] = 1.0
    loss_scale: Annotated[float, Meta(gt=0.0)] = 2.0**24


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """global_batch: samples per optimizer step over all GPUs. micro_batch: samples of one forward
    pass on one GPU; global_batch / (micro_batch * GPUs) passes are accumulated.
    activation_memory: what is kept for the backward pass: "block" the inputs of each block, "all"
    everything, "6GiB" as much beyond "block" as that holds, "auto" as much as the card has room
    for. activation_offload: unless that is everything, the inputs of blocks wait in pinned memory
    of the host (6 GiB a GPU at 1280x704x49, 4 with ffn.net.2 adapted), and more fits beside them.
    cuda_graph_tokens: a micro-batch of at most so many tokens runs on a GPU as CUDA graphs; 0:
    none does. deterministic: equal runs give equal bits on a GPU too, with slower attention (on a
    CPU they always do).
    """

    output: str
    model: ModelConfig
    data: DataConfig
    lora: LoRAConfig = LoRAConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    num_steps: Positive
    global_batch: Positive
    micro_batch: Positive = 1
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    activation_memory: str = "block"
    activation_offload: bool = False
    deterministic: bool = False
    cuda_graph_tokens: Annotated[int, Meta(ge=0)] = 4096
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 3
    log_every: Positive = 1

    @property
    def output_dir(self) -> Path:
        return Path(self.output)


def resumable_changes(config: TrainConfig) -> frozenset[str]:
    """What may differ between a checkpoint and the run that goes on from it: where things lie,
    and how work is cut up, but nothing that changes the samples or the maths. A constant learning
    rate lets a run be made longer.
    """
    longer = {"num_steps"} if config.optim.schedule == "constant" else set()
    return frozenset(
        {
            "output",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "activation_memory",
            "activation_offload",
            "cuda_graph_tokens",
            "deterministic",
            "micro_batch",
            "model.path",
            "model.attention",
            "data.datasets",
            "data.num_threads",
            "data.max_ahead",
            "data.max_damaged",
            "data.cache_dir",
            "data.cache_gib",
            *longer,
        }
    )


def flat(config: msgspec.Struct, prefix: str = "") -> dict[str, object]:
    """{"optim.lr": 1e-4, ...}: the configuration as one level of dotted keys."""
    values: dict[str, object] = {}
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if isinstance(value, msgspec.Struct):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
