"""From a configuration to the parts of a training run; no other place puts our step together, so
that what tools and benchmarks measure is what train/main.py runs.

    feed = open_feed(config, world)              batches; a benchmark makes its own
    run = build(config, world, feed.buckets)     model (or the one given), adapters, optimizer, ...
    resumed = run.resume(feed)                   of the newest checkpoint, or from step 0

Left out: the order of a step, which stands in train/main.py.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from loader.feed import Feed
from loader.identity import check_identity, folder_xxh3
from loader.models import ModelKind
from loader.shape import Bucket
from loader.vae.encoder import load_vae_encoder
from train import checkpoint, optim
from train.activations import plan as activations
from train.activations.budget import (
    parse_activation_memory,
    peak_bytes,
    raw_bytes,
    room_bytes,
)
from train.activations.offload import check_host_memory
from train.activations.runner import block_runner
from train.average import Average
from train.base import base_kind, laws_of, resolve, transformer_folder
from train.choices import (
    attention_kernels,
    attention_shapes,
    batching,
    check_math,
    micro_shapes,
)
from train.config import TrainConfig
from train.flow import check_shifts
from train.lora import adapters as lora
from train.lora.config import parse_blocks
from train.lora.start import read_start, wanted_of
from train.model.attention import Choice
from train.model.identity import weights_xxh3
from train.model.load import load_transformer, read_config
from train.model.wan import TokenShare, Wan, WanConfig
from train.parallel import mesh
from train.parallel.mesh import World
from train.parallel.sequence import check_heads, sequence_attention
from train.placement.layout import layouts, spread
from train.placement.plan import (
    ActivationPlans,
    PlanActivations,
    card_bytes,
    check_placement,
    choose_moved,
)
from train.placement.sharded import CardShares
from train.placement.streamed import HostWeights
from train.placement.weights import MovedWeights
from train.run import Run, check_state
from train.step import MicroStep
from train.subjects import check_samples
from train.tally import Tally
from train.tracking import check_tracker

log = logging.getLogger(__name__)


def open_feed(config: TrainConfig, world: World) -> Feed:
    """The training batches of this process. Raises ValueError for datasets that can't be used."""
    vae = None
    cut = batching(config, world.data_rank, world.data_size)
    kind = base_kind(config)
    if config.data.condition == "raw":
        dtype = getattr(torch, config.model.dtype)
        vae = load_vae_encoder(Path(config.model.path), world.device, dtype)
    feed = Feed(config.data, cut, world.device, vae, reads_given=bool(kind.condition))
    try:
        check_datasets(config, world, feed, kind)
        check_shifts(config.flow, _shapes(config, feed))
    except ValueError:
        feed.close()
        raise
    return feed


def _shapes(config: TrainConfig, feed: Feed) -> set[Bucket]:
    """All shapes that a run may train, validate or sample."""
    shapes = {
        Bucket.parse(shard.bucket)
        for dataset in feed.datasets
        for shards in dataset.manifest.splits.values()
        for shard in shards
    }
    return shapes | ({Bucket.parse(config.samples.shape)} if config.samples.shape else set())


def check_datasets(config: TrainConfig, world: World, feed: Feed, kind: ModelKind) -> None:
    """Are the datasets of this model? Rank 0 logs what can't be compared. Raises DatasetError."""
    vae_xxh3 = folder_xxh3(Path(config.model.path) / "vae")
    for dataset in feed.datasets:
        not_compared = check_identity(dataset.name, dataset.manifest, model=kind, vae_xxh3=vae_xxh3)
        if world.is_main:
            for line in not_compared:
                log.warning(line)


def feed_bytes(config: TrainConfig, feed: Feed) -> float:
    """An allowance for what the feed takes on the device beside its batches."""
    if config.data.condition == "latent":
        return 0.0
    return raw_bytes(feed.buckets, feed.encodes_clips)


def build(
    config: TrainConfig,
    world: World,
    buckets: Sequence[Bucket],
    *,
    model: Wan | None = None,
    feed_bytes: float = 0.0,
    free_bytes: Callable[[torch.device], float] = room_bytes,
    tensor_cores: bool = True,
    kernels: Sequence[str] | None = None,
) -> Run:
    """Everything but the feed, for batches of these `buckets`.

    model: trained instead of the weights in `model.path` (random ones, in a benchmark).
    feed_bytes: what the feed will take on the device. free_bytes(device): what the process can
    still take there; asked if activation_memory = "auto", when all that stays from step to step
    has its place but for the optimizer's state. tensor_cores: False for the low-rank products of
    a card before sm_80 (train/kernels/lowrank.py), in a benchmark. kernels: those that attention =
    "auto" may choose of, in a benchmark; None: all that can run.

    Raises ValueError for a configuration that can't run here, WeightsError, LoRAError.
    """
    device, dtype = world.device, getattr(torch, config.model.dtype)
    kind = base_kind(config, model)
    config = resolve(config, kind)
    shapes = micro_shapes(config, world.data_size, buckets, kind.layout)
    budget_bytes = parse_activation_memory(config.activation_memory)
    check_placement(config.model, config.lora, config.activation_memory)
    is_split = world.sequence_size > 1
    assert world.sequence_size == config.parallel.sequence
    # an exchange with other processes, or weights that come, would not be part of a graph
    has_graphs = device.type == "cuda" and not is_split
    _set_precision(config)

    # -- what can't be trained or sampled, before minutes go into the model ------------------
    if model is None:
        wan = read_config(Path(config.model.path) / transformer_folder(config) / "config.json")
    else:
        wan = model.config
    lora.check_targets(config.lora.targets, config.lora.rank, on_gpu=device.type == "cuda")
    check_samples(config.samples, config.data, kind, laws_of(config, kind), wan.text_dim)
    # the file is on the main process's host alone
    mesh.from_main(partial(_check_init, config, wan), world)

    # -- attention kernels, timed while the card is empty ------------------------------------
    check_heads(world.sequence_size, wan.num_attention_heads)
    choice = attention_kernels(config, world, attention_shapes(wan, shapes.values()), kernels)
    check_math(choice.kernel, config.activation_memory)

    # -- which blocks' weights are not on the card -------------------------------------------
    blocks = parse_blocks(config.lora.blocks, wan.num_layers)

    def plan_activations(room_bytes: float, weights_move: bool) -> ActivationPlans:
        graph_tokens = config.cuda_graph_tokens if has_graphs else 0
        graph_tokens = 0 if weights_move else graph_tokens
        plans = activations.plan_run(
            wan,
            list(shapes.values()),
            targets=config.lora.targets,
            dtype_bytes=dtype.itemsize,
            budget_bytes=budget_bytes,
            room_bytes=room_bytes - feed_bytes,
            max_graph_tokens=graph_tokens,
            attention=choice,
            offload=config.activation_offload,
            first_block=blocks[0],
            weights_move=weights_move,
        )
        return ActivationPlans(plans, peak_bytes(plans, graph_tokens))

    # the weights of a model that was given have taken their room already
    held_bytes = 0 if model is None else sum(each.nbytes for each in model.parameters())
    weights = _moved_weights(
        config, world, wan, blocks, plan_activations, lambda: free_bytes(device) + held_bytes
    )

    # -- the frozen base and its adapters ----------------------------------------------------
    base_weights = ""
    if model is None:
        model_dir, folder = Path(config.model.path), transformer_folder(config)
        model = load_transformer(model_dir, device, dtype, folder, elsewhere=weights)
        base_weights = weights_xxh3(model_dir, folder)
    elif weights is not None:
        weights.take(model)
    adapters = lora.attach(
        model,
        targets=config.lora.targets,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        seed=config.seed,
        nf4=config.lora.base == "nf4",
        tensor_cores=tensor_cores,
        blocks=blocks,
    )
    # with one learning rate A and B lie as they ever did: checkpoints hold them in this order
    two_rates = len(optim.lr_ratios(config.optim)) == 2
    groups = adapters.parameters_apart() if two_rates else (adapters.parameters(),)
    flat_parameters = optim.flatten(*groups)
    optimizer = optim.make_optimizer(flat_parameters.groups, config.optim)
    average = Average(flat_parameters.vector, config.optim.ema) if config.optim.ema else None
    scaling = dtype == torch.float16
    scaler = optim.make_scaler(device, scaling, config.optim)

    if weights is not None:
        weights.start(model, adapters)

    # -- what each shape saves for the backward pass -----------------------------------------
    planned_bytes = 0.0
    if budget_bytes is None:
        optimizer_bytes = 8 * flat_parameters.vector.numel()  # made by its first step
        planned_bytes = free_bytes(device) - optimizer_bytes
    if is_split:
        # who shares samples must do the same exchanges again, so all plan for the fullest card
        planned_bytes = -float(mesh.maximum(-int(planned_bytes), world))
    plans = plan_activations(planned_bytes, weights is not None).plans

    check_host_memory(plans.values(), world)

    micro_step = MicroStep(
        model,
        set_seeds=adapters.set_seeds,
        attention=choice.attention,
        run_block=block_runner(model, plans, adapters.first_block, world.sequence_size),
        scaler=scaler,
        global_batch=config.global_batch,
        max_graph_tokens=0 if weights or is_split else config.cuda_graph_tokens,
        share=_token_share(world, choice) if is_split else None,
    )
    return Run(
        config=config,
        kind=kind,
        laws=laws_of(config, kind),
        world=world,
        model=model,
        kernels=choice,
        adapters=adapters,
        flat=flat_parameters,
        optimizer=optimizer,
        average=average,
        scaler=scaler,
        plans={bucket: plans[shape] for bucket, shape in shapes.items()},
        micro_step=micro_step,
        tally=Tally(device, scaling),
        base_weights=base_weights,
        weights=weights,
    )


def check_goes_on(config: TrainConfig, world: World) -> None:
    """Is wandb there, and can the run go on from its newest checkpoint, if it has one? Before
    minutes go into the model. Not in `build`, which others use for a part of a run. Raises
    CheckpointError, ValueError.
    """
    # the checkpoint is on the main process's host alone
    mesh.from_main(partial(_check_goes_on, config), world)


def _check_goes_on(config: TrainConfig) -> None:
    check_tracker(config.wandb)
    newest = checkpoint.latest_intact(config.output_dir).folder
    if newest is not None:
        config = resolve(config, base_kind(config, None))
        base_weights = weights_xxh3(Path(config.model.path), transformer_folder(config))
        check_state(config, newest, checkpoint.read_state(newest), base_weights)


def _check_init(config: TrainConfig, wan: WanConfig) -> None:
    """Is `lora.init`, where the run starts from that, a LoRA for this model? Raises LoRAError."""
    if config.lora.init and checkpoint.latest(config.output_dir) is None:
        wanted = wanted_of(wan, config.lora)
        read_start(Path(config.lora.init), wanted, config.model.expert)


def _token_share(world: World, choice: Choice) -> TokenShare:
    """This process's share of each sample's tokens."""
    return TokenShare(
        number=world.sequence_rank,
        num_parts=world.sequence_size,
        attention=sequence_attention(choice.attention, world),
    )


def _moved_weights(
    config: TrainConfig,
    world: World,
    wan: WanConfig,
    adapted: Sequence[int],
    plan_activations: PlanActivations,
    room: Callable[[], float],
) -> MovedWeights | None:
    """The weights that are not resident, None if all are."""
    dtype, lora_config = getattr(torch, config.model.dtype), config.lora
    card = card_bytes(wan, len(adapted), lora_config.targets, lora_config.rank, dtype)
    num_moved = choose_moved(
        config.model,
        lora_config,
        config.activation_memory,
        wan.num_layers,
        card,
        plan_activations,
        room,
    )
    # the cards of a run may have room for more or less: all move what one has to
    num_moved = mesh.maximum(num_moved, world)
    if not num_moved:
        return None
    moved = spread(wan.num_layers, num_moved)
    by_block = layouts(wan, moved, adapted, lora_config.targets, lora_config.rank, dtype)
    make_source = CardShares if config.model.placement == "sharded" else HostWeights
    source = make_source(list(by_block.values()), dtype, world)
    return MovedWeights(moved, by_block, source, world.device, dtype)


def _set_precision(config: TrainConfig) -> None:
    """torch's switches for the whole process."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first GEMM runs
        torch.use_deterministic_algorithms(True)
    # sums over K = 14336 overflow in fp16
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
