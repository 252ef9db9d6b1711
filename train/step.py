"""One micro-batch: what the model gets of it, the loss, the backward pass; as CUDA graphs where
it is small.

A micro-batch of a thousand tokens is thousands of kernels of a few microseconds, and launching
them takes longer than they run. So a shape of at most `max_graph_tokens` tokens is captured once,
its forward and its backward pass as a graph each, and replayed from then on: one launch. What
changes from sample to sample (latents, text, timesteps, the number of clean frames, seeds) is
copied into the tensors that the graphs read; adapters and gradients have fixed places anyway, and
gradients accumulate inside the graph. The first micro-batch of each shape runs as it is, and so
warms up everything that may not happen in a capture. Graphs of all shapes share one pool of
memory, because they never run at once.

Shapes: B samples, C latent channels, T/h/w latent frames, rows, columns, S = 512 text tokens, R =
2 modulation rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loader.feed import Batch
from train import flow
from train.config import FlowConfig
from train.model.attention import Attention
from train.model.wan import RunBlock, Wan


class Inputs(NamedTuple):
    """See train.model.wan.Wan.forward for the first three and the text; seeds_B int64 decide LoRA
    dropout.
    """

    latent_BCThw: Tensor
    t_BR: Tensor
    num_clean_frames_B: Tensor
    text_BSD: Tensor
    target_BCThw: Tensor
    seeds_B: Tensor


def prepare(batch: Batch, config: FlowConfig) -> Inputs:
    """Noise a batch: timesteps and noise follow from each sample's seed."""
    device = batch.latent_BCTHW.device
    noise = flow.sample_noise(batch.seeds, batch.latent_BCTHW.shape[1:], device)
    sigmas = [flow.sample_sigma(seed, config.timesteps, config.shift) for seed in batch.seeds]
    noised = flow.noise_latent(
        batch.latent_BCTHW, noise, sigmas, batch.is_i2v, batch.condition_BC1HW
    )
    return Inputs(
        noised.latent_BCThw,
        noised.t_BR,
        noised.num_clean_frames_B,
        batch.text_BSD,
        noised.target_BCThw,
        flow.to_device(batch.seeds, torch.int64, device),
    )


class _Graphs(NamedTuple):
    inputs: Inputs
    loss: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class MicroStep:
    """`forward` and then `backward` of one micro-batch; the gradient of `share` times its loss is
    added up.
    """

    def __init__(
        self,
        model: Wan,
        set_seeds: Callable[[Tensor], None],
        attention: Attention,
        run_block: RunBlock,
        scaler: torch.amp.GradScaler,
        share: float,
        max_graph_tokens: int,
    ):
        self._model, self._set_seeds, self._attention, self._run_block = (
            model,
            set_seeds,
            attention,
            run_block,
        )
        self._scaler, self._share, self._max_graph_tokens = scaler, share, max_graph_tokens
        self._graphs: dict[torch.Size, _Graphs | None] = {}  # None: warmed up
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._running: Tensor | _Graphs | None = None

    def forward(self, inputs: Inputs) -> Tensor:
        """The mean loss of the micro-batch: a float32 scalar without a graph, valid until the
        next call.
        """
        shape = inputs.latent_BCThw.shape
        num_tokens = shape[0] * shape[2:].numel() // math.prod(self._model.config.patch_size)
        if not inputs.latent_BCThw.is_cuda or num_tokens > self._max_graph_tokens:
            self._running = self._loss(inputs)
            return self._running.detach()
        if shape not in self._graphs:
            self._graphs[shape] = None
            self._running = self._loss(inputs)
            return self._running.detach()
        graphs = self._graphs[shape] or self._capture(inputs)
        self._graphs[shape] = self._running = graphs
        for place, value in zip(graphs.inputs, inputs, strict=True):
            place.copy_(value)
        graphs.forward.replay()
        return graphs.loss

    def backward(self) -> None:
        """Of the last `forward`."""
        if isinstance(self._running, _Graphs):
            self._running.backward.replay()
        elif self._running is not None:
            self._scaler.scale(self._running * self._share).backward()
        self._running = None

    def _loss(self, inputs: Inputs) -> Tensor:
        latent_BCThw, t_BR, num_clean_frames_B, text_BSD, target_BCThw, seeds_B = inputs
        if text_BSD.shape[2] != self._model.config.text_dim:
            raise ValueError(
                f"the dataset's text embeddings are {text_BSD.shape[2]} wide, the model's text_dim is "
                f"{self._model.config.text_dim}: build the dataset with this model, or set model.path"
            )
        self._set_seeds(seeds_B)
        velocity_BCThw = self._model(
            latent_BCThw, t_BR, num_clean_frames_B, text_BSD, self._attention, self._run_block
        )
        return flow.sample_losses(velocity_BCThw, target_BCThw, num_clean_frames_B).mean()

    def _capture(self, inputs: Inputs) -> _Graphs:
        places = Inputs(*(value.clone() for value in inputs))
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # the feed's threads go on allocating and copying meanwhile: only this thread must not
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._loss(places)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            self._scaler.scale(loss * self._share).backward()
        return _Graphs(places, loss.detach(), forward, backward)
