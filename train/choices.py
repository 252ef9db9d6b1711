"""What a run decides for each of its shapes before the first step: how many samples a micro-batch
has, and which attention kernels run.

Both change speed and memory only, so both may differ when a run goes on from a checkpoint. The
kernels that were timed are kept then, because timings differ by chance, and with another kernel the
run would round differently.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from loader.batching import Batching
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket, LatentLayout
from train import checkpoint
from train.activations.sizes import Shape
from train.config import TrainConfig
from train.model.attention import (
    AttentionShape,
    Choice,
    choose_attention,
    from_table,
    still_holds,
)
from train.model.wan import WanConfig
from train.parallel import mesh
from train.parallel.mesh import World
from train.parallel.sequence import check_sequence

log = logging.getLogger(__name__)


def check_math(kernel: str, activation_memory: str) -> None:
    """Raises ValueError if this attention kernel leaves nothing to save under a byte budget."""
    if kernel == "math" and activation_memory not in ("all", "block"):
        raise ValueError(
            f'activation_memory = "{activation_memory}": attention = "math" is many small '
            f'operations, none of which can be saved alone; use "all" or "block"'
        )


def batching(config: TrainConfig, rank: int, world_size: int) -> Batching:
    """How the global batches are cut up for process `rank` of `world_size`, or for one of so many
    sequence groups. Raises ValueError if they can't be divided equally.
    """
    if config.micro_tokens and config.micro_batch != 1:
        raise ValueError(
            f"micro_batch = {config.micro_batch} and micro_tokens = {config.micro_tokens}: set one "
            f"of them"
        )
    if config.global_batch % (config.micro_batch * world_size):
        sequence = config.parallel.sequence
        who = "processes" if sequence == 1 else f"groups of {sequence} processes"
        raise ValueError(
            f"global_batch = {config.global_batch} is not a multiple of micro_batch x {who} = "
            f"{config.micro_batch} x {world_size}"
        )
    return Batching(
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        micro_tokens=config.micro_tokens,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
    )


def micro_shapes(
    config: TrainConfig, world_size: int, buckets: Iterable[Bucket], layout: LatentLayout
) -> dict[Bucket, Shape]:
    """A process's part of a micro-batch of each bucket, of the model's layout; world_size: of data,
    as in `batching`. Raises ValueError as that does, and where parallel.sequence does not divide
    the tokens.
    """
    cut = batching(config, rank=0, world_size=world_size)
    num_tokens = {bucket: layout.num_tokens(bucket) for bucket in buckets}
    sequence = config.parallel.sequence
    check_sequence(sequence, {str(bucket): number for bucket, number in num_tokens.items()})
    return {
        bucket: Shape(
            cut.micro_batch_of(number), number // sequence, MAX_TEXT_TOKENS, num_parts=sequence
        )
        for bucket, number in num_tokens.items()
    }


def attention_shapes(wan: WanConfig, shapes: Iterable[Shape]) -> list[AttentionShape]:
    """Of the self-attention and the cross-attention of each micro-batch."""
    return [
        AttentionShape(
            batch=shape.batch,
            num_heads=num_heads,
            num_queries=num_queries,
            num_keys=num_keys,
            head_dim=wan.attention_head_dim,
        )
        for shape in shapes
        for num_heads, num_queries, num_keys in (
            # of a part of the heads, all tokens
            (
                wan.num_attention_heads // shape.num_parts,
                shape.num_all_tokens,
                shape.num_all_tokens,
            ),
            (wan.num_attention_heads, shape.num_tokens, shape.num_text_tokens),
        )
    ]


def attention_kernels(
    config: TrainConfig,
    world: World,
    shapes: Sequence[AttentionShape],
    kernels: Sequence[str] | None = None,
) -> Choice:
    """The attention kernels of the run: the main process chooses, of `kernels` if they are given,
    and everyone takes what it chose. Raises ValueError on all of them for what can't run.
    """
    return mesh.from_main(partial(_choose, config, world.device, shapes, kernels), world)


def _choose(
    config: TrainConfig,
    device: torch.device,
    shapes: Sequence[AttentionShape],
    kernels: Sequence[str] | None,
) -> Choice:
    dtype, name = getattr(torch, config.model.dtype), config.model.attention
    saved = None
    if name == "auto" and not config.deterministic:
        saved = _saved_choice(config)
    # one kernel needs no timing, and then there are no rows; those of a run that was deterministic
    # have no times
    if saved is not None and saved.rows and all(row.times_ms for row in saved.rows):
        if still_holds(saved, device, dtype, shapes):
            return saved
        log.warning(
            "attention: the kernels of the checkpoint were chosen on %s for %d pairs of lengths; "
            "this card, its kernels or these lengths are others, so they are timed again",
            saved.card,
            len(saved.rows),
        )
    return choose_attention(
        name,
        device,
        dtype,
        deterministic=config.deterministic,
        shapes=shapes,
        kernels=kernels,
    )


def _saved_choice(config: TrainConfig) -> Choice | None:
    """That of the newest checkpoint; None if there is none, or it is of an older program."""
    try:
        newest = checkpoint.latest_intact(config.output_dir).folder
        if newest is None:
            return None
        table = checkpoint.read_state(newest).get("attention")
    except checkpoint.CheckpointError:
        # the run can't go on from it, and says so where it tries
        return None
    return None if table is None else from_table(table)
