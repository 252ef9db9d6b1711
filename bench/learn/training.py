"""One training step of a small network, as a CUDA graph: launching a thousand small kernels takes
longer than running them.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 on a GPU. A graph can't hold the cache of casted weights."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False
    )


class GraphedTraining:
    """`step(inputs, lr)` trains `network` on `loss_of(*inputs)`; returns the loss, on the device.

    The inputs always have the shapes and dtypes of `example`. graphed: False for step by step.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[..., Tensor],
        example: Sequence[Tensor],
        *,
        weight_decay: float,
        graphed: bool,
    ):
        self._parameters = list(network.parameters())
        self._loss_of = loss_of
        device = self._parameters[0].device
        self._device, self._graphed = device, graphed and device.type == "cuda"
        self._lr = torch.tensor(1e-3, device=device)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._lr,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )
        self._inputs = [x.clone() for x in example]
        self._loss = torch.zeros((), device=device)
        if self._graphed:
            self._capture()

    def step(self, inputs: Sequence[Tensor], lr: float) -> Tensor:
        for place, x in zip(self._inputs, inputs, strict=True):
            place.copy_(x)
        self._lr.fill_(lr)
        if self._graphed:
            self._graph.replay()
        else:
            self._train()
        return self._loss

    def _train(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._device):
            loss = self._loss_of(*self._inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._loss = loss.detach()

    def _capture(self) -> None:
        # kernels are chosen, and the optimizer's state is made, outside of the graph; at a learning
        # rate of 0 the warm-up changes nothing but the optimizer's averages
        self._lr.fill_(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._train()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._train()


class Clock:
    """How much of a training of `seconds`, or of `max_steps` if that is not 0, is done."""

    def __init__(self, seconds: float, max_steps: int):
        self._seconds, self._max_steps = seconds, max_steps
        self._start_s = time.perf_counter()
        self._num_steps, self._done = 0, 0.0

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start_s

    def next(self) -> bool:
        """Whether there is another step; counts it."""
        if self._max_steps:
            self._done = self._num_steps / self._max_steps
        else:
            # replayed steps run behind the host's clock: wait for them now and then
            if self._num_steps % 20 == 0 and torch.cuda.is_available():
                torch.cuda.synchronize()
            self._done = self.elapsed_s / self._seconds
        if self._done >= 1:
            return False
        self._num_steps += 1
        return True

    def lr(self, peak: float, warmup_steps: int) -> float:
        """A short warm-up, then half a cosine down to a hundredth."""
        cosine = 0.5 * (1 + math.cos(math.pi * self._done))
        return peak * min(1.0, self._num_steps / warmup_steps) * (cosine + 0.01)
