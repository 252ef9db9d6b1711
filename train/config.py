"""TrainConfig: everything that decides a training run, one TOML file. Each part of the trainer
owns the table that it reads; this module puts them together. Defaults are those of a pair of
V100.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from loader.feed_config import FeedConfig
from train.checkpoint import CheckpointConfig
from train.early_stop import EarlyStopConfig
from train.flow import FlowConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.parallel.config import ParallelConfig
from train.sampling import SamplesConfig
from train.tracking import WandbConfig
from train.validate import ValidationConfig
from train.watch import WatchConfig

Positive = Annotated[int, Meta(ge=1)]


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run."""

    # folder of everything that the run writes; it goes on from the newest checkpoint there
    output: Annotated[str, Meta(min_length=1)]
    model: ModelConfig
    data: FeedConfig
    lora: LoRAConfig = LoRAConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    validation: ValidationConfig = ValidationConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    wandb: WandbConfig = WandbConfig()
    parallel: ParallelConfig = ParallelConfig()
    # how long it trains: optimizer steps, or passes over the datasets; one of the two
    num_steps: Annotated[int, Meta(ge=0)] = 0
    num_epochs: Annotated[int, Meta(ge=0)] = 0
    # samples of an optimizer step, over all GPUs
    global_batch: Positive
    # samples of one forward pass on one GPU; global_batch / (micro_batch * GPUs) passes are
    # accumulated. With parallel.sequence a group of GPUs counts as one
    micro_batch: Positive = 1
    # instead: as many samples as have at most so many video tokens together, for each shape; what
    # divides a GPU's share of the global batch, and at least one. 0: micro_batch decides
    micro_tokens: Annotated[int, Meta(ge=0)] = 0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    # what is saved for the backward pass: "block" the inputs of each block, "all" everything,
    # "6GiB" as much beyond "block" as that holds, "auto" as much as the card has room for
    activation_memory: str = "block"
    # unless everything is saved, the inputs of blocks wait in pinned memory of the host (6 GiB a
    # GPU at 1280x704x49, 4 with ffn.net.2 adapted), and more fits beside them
    activation_offload: bool = False
    # equal runs give equal bits on a GPU too, with slower attention (on a CPU they always do)
    deterministic: bool = False
    # a micro-batch of at most so many tokens runs on a GPU as CUDA graphs; 0: none does, nor with
    # parallel.sequence
    cuda_graph_tokens: Annotated[int, Meta(ge=0)] = 4096
    # optimizer steps between lines of the log
    log_every: Positive = 1

    def __post_init__(self) -> None:
        if bool(self.num_steps) == bool(self.num_epochs):
            raise ValueError(
                f"num_steps = {self.num_steps} and num_epochs = {self.num_epochs}: give one of them"
            )

    @property
    def output_dir(self) -> Path:
        return Path(self.output)


def in_steps(config: TrainConfig, num_batches_per_epoch: int) -> TrainConfig:
    """The configuration with num_steps, where it has num_epochs: as many steps as they have whole
    global batches.
    """
    if not config.num_epochs:
        return config
    num_steps = config.num_epochs * num_batches_per_epoch
    return msgspec.structs.replace(config, num_steps=num_steps, num_epochs=0)


# What may always differ between a checkpoint and the run that goes on from it: where things lie,
# what is written and how work is cut up, but nothing that changes the samples or the maths.
_RESUMABLE = frozenset(
    {
        "output",
        "checkpoint.every",
        "checkpoint.keep_newest",
        "checkpoint.keep_every",
        "checkpoint.lora_dtype",
        # names of older versions
        "checkpoint_every",
        "keep_checkpoints",
        "watch.silent_s",
        "watch.stuck_s",
        "wandb.project",
        "wandb.mode",
        "wandb.media",
        "log_every",
        "activation_memory",
        "activation_offload",
        "cuda_graph_tokens",
        "deterministic",
        "micro_batch",
        "micro_tokens",
        # what is looked at, not what is trained; the windows and their noise stay, though: losses
        # are compared with the base's and the reference's in the checkpoint
        "validation.every",
        "early_stop.patience",
        "samples.every",
        "samples.num_clips",
        "samples.keys",
        "samples.prompts",
        "samples.shape",
        "samples.num_steps",
        "samples.guidance",
        "samples.seed",
        "model.path",
        "parallel.sequence",
        "model.attention",
        "model.placement",
        "model.resident_blocks",
        "data.datasets",
        # which samples it leaves out is part of the feed's own state
        "data.exclude",
        "data.num_threads",
        "data.max_ahead",
        "data.max_damaged",
        "data.cache_dir",
        "data.cache_gib",
    }
)


# What decides which losses are compared: it may differ as long as none were measured.
_UNTIL_VALIDATED = frozenset(
    {"validation.num_windows", "validation.num_train_windows", "validation.seed"}
)


def resumable_changes(config: TrainConfig, *, is_validated: bool) -> frozenset[str]:
    """The dotted keys that may differ between a checkpoint and the run that goes on from it.

    is_validated: the checkpoint holds losses of windows, of the base and of its reference.
    """
    changes = set(_RESUMABLE)
    # with a cosine, num_steps decides the learning rate of every step
    if config.optim.schedule == "constant":
        changes.add("num_steps")
    if not is_validated:
        changes |= _UNTIL_VALIDATED
    return frozenset(changes)


def defaults() -> dict[str, object]:
    """The dotted keys and their defaults; those of keys without a default mean nothing."""
    model, data = ModelConfig(path=""), FeedConfig(datasets=[""])
    return flat(TrainConfig(output="", model=model, data=data, num_steps=1, global_batch=1))


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
