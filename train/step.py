"""One micro-batch: what the model gets of it, the loss, and the backward pass.

    MicroStep.forward(inputs) -> losses_B    by EagerStep or, for small shapes on a GPU, GraphedStep
    MicroStep.backward()                     adds the gradient of their mean up
    MicroStep.losses(inputs) -> losses_B     alone, for instance under torch.no_grad()

A micro-batch of a thousand tokens is thousands of kernels of a few microseconds, and launching
them takes longer than they run. So a shape of at most `max_graph_tokens` tokens is captured once,
its forward and its backward pass as a CUDA graph each, and replayed from then on: one launch.

Shapes: B samples, C latent channels, T/h/w latent frames, rows, columns, S = 512 text tokens, R =
2 modulation rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loader.batch import Batch
from train import flow
from train.flow import NoiseLaws
from train.model.attention import Attention
from train.model.wan import RunBlock, TokenShare, Wan, latent_grid, velocity_tokens


class Inputs(NamedTuple):
    """What a forward pass depends on. See train.model.wan.Wan.forward for the first three and the
    text; `seeds_B`, int64, decides LoRA dropout; `weight_B`, float32, multiplies the losses.
    """

    latent_BCThw: Tensor
    t_BR: Tensor
    num_clean_frames_B: Tensor
    text_BSD: Tensor
    target_BCThw: Tensor
    seeds_B: Tensor
    weight_B: Tensor


def prepare(batch: Batch, laws: NoiseLaws) -> Inputs:
    """Noise a batch: timesteps and noise follow from each sample's seed."""
    device = batch.latent_BCTHW.device
    noise_BCThw = flow.sample_noise(batch.seeds, batch.latent_BCTHW.shape[1:], device)
    law = laws.of(batch.bucket)
    sigmas = [flow.sample_sigma(seed, law) for seed in batch.seeds]
    weights = [flow.loss_weight(sigma, law) for sigma in sigmas]
    return noised_inputs(batch, noise_BCThw, sigmas, batch.seeds, weights)


def noised_inputs(
    batch: Batch,
    noise_BCThw: Tensor,
    sigmas: Sequence[float],
    seeds: Sequence[int],
    weights: Sequence[float],
) -> Inputs:
    """A batch with this noise at these levels; `seeds` decide LoRA dropout, `weights` multiply the
    losses.
    """
    device = batch.latent_BCTHW.device
    # a model that is given its first frame beside the latent learns all of the latent's frames
    is_given = batch.given_BCTHW is not None
    has_clean_frame = [False] * len(batch.is_i2v) if is_given else batch.is_i2v
    noised = flow.noise_latent(
        batch.latent_BCTHW, noise_BCThw, sigmas, has_clean_frame, batch.condition_BC1HW
    )
    latent_BCThw = noised.latent_BCThw
    if batch.given_BCTHW is not None:
        latent_BCThw = flow.with_given(latent_BCThw, batch.given_BCTHW)
    return Inputs(
        latent_BCThw=latent_BCThw,
        t_BR=noised.t_BR,
        num_clean_frames_B=noised.num_clean_frames_B,
        text_BSD=batch.text_BSD,
        target_BCThw=noised.target_BCThw,
        seeds_B=flow.to_device(seeds, torch.int64, device),
        weight_B=flow.to_device(weights, torch.float32, device),
    )


# inputs -> the loss of each sample, float32 [B]
LossFunction = Callable[[Inputs], Tensor]
# losses_B -> what `backward` is called on
ScaleLoss = Callable[[Tensor], Tensor]


class EagerStep:
    """Forward and backward pass as ordinary PyTorch, for any shape."""

    def __init__(self, losses: LossFunction, scale_loss: ScaleLoss):
        self._losses, self._scale_loss = losses, scale_loss
        self._last_B: Tensor | None = None

    def forward(self, inputs: Inputs) -> Tensor:
        self._last_B = self._losses(inputs)
        return self._last_B.detach()

    def backward(self) -> None:
        assert self._last_B is not None, "backward() needs a forward() of its own"
        self._scale_loss(self._last_B).backward()
        self._last_B = None


class GraphedStep:
    """Forward and backward pass of one shape as a CUDA graph each.

    What changes from sample to sample (latents, text, timesteps, the number of clean frames,
    seeds) is copied into the tensors that the graphs read. Adapters and gradients have fixed
    places anyway, and gradients accumulate inside the graph. `pool` (of
    torch.cuda.graph_pool_handle) is shared by the graphs of all shapes, which never run at once.
    """

    def __init__(
        self,
        losses: LossFunction,
        scale_loss: ScaleLoss,
        example: Inputs,
        pool: Any,
    ):
        self._inputs = Inputs(*(value.clone() for value in example))
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # the feed's threads go on allocating and copying meanwhile: only this thread must not
        with torch.cuda.graph(self._forward, pool=pool, capture_error_mode="thread_local"):
            captured_B = losses(self._inputs)
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
            scale_loss(captured_B).backward()
        self._losses_B = captured_B.detach()

    def forward(self, inputs: Inputs) -> Tensor:
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._forward.replay()
        return self._losses_B

    def backward(self) -> None:
        self._backward.replay()


class MicroStep:
    """`forward` and then `backward` of one micro-batch after another.

    The gradient of its part of the mean over `global_batch` samples, scaled by `scaler`, is added
    to the parameters' `.grad`. `set_seeds(seeds_B, first_token)` is called before each pass;
    `run_block` decides what blocks save for the backward pass (train/activations/). `share`: this
    process trains on so many tokens of each sample, and its losses and gradients are parts of the
    sample's, whose sum over the processes is the whole.
    """

    def __init__(
        self,
        model: Wan,
        set_seeds: Callable[[Tensor, int], None],
        attention: Attention,
        run_block: RunBlock,
        scaler: torch.amp.GradScaler,
        global_batch: int,
        max_graph_tokens: int,
        share: TokenShare | None = None,
    ):
        assert not (share and max_graph_tokens), "exchanges are not captured"
        self._share = share
        self._model, self._set_seeds = model, set_seeds
        self._attention, self._run_block = attention, run_block
        self._scaler, self._global_batch = scaler, global_batch
        self._max_graph_tokens = max_graph_tokens
        self._eager = EagerStep(self.losses, self._scale_loss)
        # latent shape -> its graphs; None: the shape has been seen once
        self._graphed: dict[torch.Size, GraphedStep | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._current: EagerStep | GraphedStep = self._eager

    def forward(self, inputs: Inputs) -> Tensor:
        """The loss of each sample: float32 [B] without a graph, valid until the next call. Raises
        ValueError if the text is not as wide as the model takes it.
        """
        self._current = self._step_for(inputs)
        return self._current.forward(inputs)

    def backward(self) -> None:
        """Of the last `forward`."""
        self._current.backward()

    def backward_eagerly(self, inputs: Inputs) -> None:
        """Forward and backward pass without a graph, whatever the shape."""
        self._eager.forward(inputs)
        self._eager.backward()

    def loss(self, inputs: Inputs) -> Tensor:
        """The mean loss of the micro-batch, float32 scalar, of all tokens; see `losses`. Other
        processes have no part in it.
        """
        self._begin(inputs, first_token=0)
        return self._of_samples(inputs).mean()

    def losses(self, inputs: Inputs) -> Tensor:
        """The weighted loss of each sample, float32 [B], or this process's part of it. Without
        gradients (torch.no_grad) nothing is saved, so any shape will do.
        """
        if self._share is None:
            self._begin(inputs, first_token=0)
            return self._of_samples(inputs)
        return self._of_tokens(inputs, self._share)

    def _begin(self, inputs: Inputs, first_token: int) -> None:
        if inputs.text_BSD.shape[2] != self._model.config.text_dim:
            raise ValueError(
                f"the dataset's text embeddings are {inputs.text_BSD.shape[2]} wide, the model's "
                f"text_dim is {self._model.config.text_dim}: build the dataset with this model, "
                f"or set model.path"
            )
        self._set_seeds(inputs.seeds_B, first_token)

    def _of_samples(self, inputs: Inputs) -> Tensor:
        velocity_BCThw = self._model(
            inputs.latent_BCThw,
            inputs.t_BR,
            inputs.num_clean_frames_B,
            inputs.text_BSD,
            self._attention,
            self._run_block if torch.is_grad_enabled() else None,
        )
        losses_B = flow.sample_losses(
            velocity_BCThw, inputs.target_BCThw, inputs.num_clean_frames_B
        )
        return losses_B * inputs.weight_B

    def _of_tokens(self, inputs: Inputs, share: TokenShare) -> Tensor:
        patch_size = self._model.config.patch_size
        grid = latent_grid(inputs.latent_BCThw.shape, patch_size)
        first = share.first(grid.num_tokens)
        self._begin(inputs, first)
        velocity_BLP = self._model.token_velocity(
            inputs.latent_BCThw,
            inputs.t_BR,
            inputs.num_clean_frames_B,
            inputs.text_BSD,
            self._attention,
            self._run_block if torch.is_grad_enabled() else None,
            share,
        )
        target_BLP = velocity_tokens(inputs.target_BCThw, patch_size)
        losses_B = flow.token_losses(
            velocity_BLP,
            target_BLP[:, first : first + velocity_BLP.shape[1]],
            clean_tokens_B=inputs.num_clean_frames_B * (grid.rows * grid.columns),
            first_token=first,
            num_tokens=grid.num_tokens,
        )
        return losses_B * inputs.weight_B

    def _scale_loss(self, losses_B: Tensor) -> Tensor:
        # of equal micro-batches, as many as a global batch has on all processes
        share = 1 / (self._global_batch // len(losses_B))
        scaled: Tensor = self._scaler.scale(losses_B.mean() * share)
        return scaled

    def _step_for(self, inputs: Inputs) -> EagerStep | GraphedStep:
        shape = inputs.latent_BCThw.shape
        num_tokens = shape[0] * shape[2:].numel() // math.prod(self._model.config.patch_size)
        if self._pool is None or not inputs.latent_BCThw.is_cuda:
            return self._eager
        if num_tokens > self._max_graph_tokens:
            return self._eager
        # The first micro-batch of a shape runs eagerly, and so warms up everything that may not
        # happen in a capture (cuBLAS handles, Triton's compilation, the loss scaler's tensor).
        if shape not in self._graphed:
            self._graphed[shape] = None
            return self._eager
        graphed = self._graphed[shape]
        if graphed is None:
            graphed = GraphedStep(self.losses, self._scale_loss, inputs, self._pool)
            self._graphed[shape] = graphed
        return graphed
