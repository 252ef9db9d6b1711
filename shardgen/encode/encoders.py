"""Both models of a worker: the VAE and the text encoder, one on the device at a time.

On a GPU nothing waits for a copy: frames go there as bytes through pinned memory, on a stream of
their own, and become numbers in [-1, 1] there; latents come back on another one.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from loader.shape import Bucket
from loader.vae.check import TOLERANCE, deviation_from_float32, overflowing_layer
from loader.vae.encoder import VAEError, load_vae_encoder
from loader.vae.memory import EncodePlan, plan_encoding
from shardgen.encode.text import EncodedText, TextEncoder
from shardgen.encode.unit import EncodeSpec
from shardgen.media.decode import Frames

CPU_CHUNK_FRAMES = 16


class DeviceError(ValueError):
    """A worker can't use the device; the message says which and what to do."""


class EncodedVideo(NamedTuple):
    """Latents: float16 [B, C, T, h, w], finite, and the seconds that the device took for them."""

    latents: np.ndarray[Any, Any]
    device_s: float


class Encoders:
    """Both models. Their weights stay on the CPU; `on_device` lends one of them the device.
    Raises DeviceError.
    """

    def __init__(self, spec: EncodeSpec) -> None:
        self.spec = spec
        self.device, self.dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        if self.device.type == "cuda":
            check_memory(spec.vae_memory_gib)
            self._upload, self._download = torch.cuda.Stream(), torch.cuda.Stream()
        torch.set_num_threads(spec.threads)
        # a timed choice of algorithm would change bytes from run to run
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        # float32 means float32
        torch.backends.cudnn.allow_tf32 = False
        transformers.utils.logging.disable_progress_bar()
        self.vae = load_vae_encoder(Path(spec.model), "cpu", self.dtype)
        self.text = TextEncoder(Path(spec.model), self.device, self.dtype)
        if self.device.type == "cuda":
            self._check_vae()

    def _check_vae(self) -> None:
        """Encode something small and compare. Raises DeviceError."""
        reference = copy.deepcopy(self.vae).float()
        with self.on_device(self.vae):
            deviation = deviation_from_float32(self.vae, reference)
        # not "deviation > tolerance": it may be NaN
        if not deviation <= TOLERANCE[self.dtype]:
            raise DeviceError(
                f"{torch.cuda.get_device_name()} encodes wrongly in {self.spec.dtype}: a test "
                f"latent is {deviation:.2g} from that of float32 (relative L2; at most "
                f"{TOLERANCE[self.dtype]:g}), with cuDNN {torch.backends.cudnn.version()}; install "
                f"the versions of configs/env, or set another encode.dtype"
            )

    @contextmanager
    def on_device(self, model: torch.nn.Module) -> Iterator[None]:
        """A copy of the weights on the device, dropped at the end: nothing is copied back."""
        host = [(tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers())]
        for tensor, data in host:
            tensor.data = data.to(self.device)
        try:
            yield
        finally:
            for tensor, data in host:
                tensor.data = data
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def plan(self, bucket: Bucket) -> EncodePlan:
        """How windows of this shape are encoded. Raises DeviceError where the memory budget is too
        small.
        """
        if self.device.type == "cpu":
            return EncodePlan(self.spec.vae_batch, CPU_CHUNK_FRAMES)
        budget_gib = self.spec.vae_memory_gib
        plan = plan_encoding(bucket, budget_gib, self.vae.stage_bytes_per_pixel)
        if plan is None:
            raise DeviceError(
                f"encode.vae_memory_gib = {budget_gib:g} is too little for windows of {bucket} in "
                f"{self.spec.dtype}: raise it, or take smaller windows"
            )
        return plan

    @torch.inference_mode()
    def start_video(
        self, windows: list[Frames], chunk_frames: int, num_grey_frames: int = 0
    ) -> Callable[[], EncodedVideo]:
        """Start to encode windows uint8 [F, H, W, 3]; the function that is returned waits for the
        latents. The VAE must be on the device until then. num_grey_frames: see VAEEncoder.encode.

        That function raises VAEError if they aren't finite.
        """
        shape = (len(windows), *windows[0].shape)
        is_cuda = self.device.type == "cuda"
        host_BFHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
        np.stack(windows, out=host_BFHWC.numpy())
        video_BCFHW = host_BFHWC.movedim(-1, 1)
        if not is_cuda:
            begin_s = time.perf_counter()
            latent_BCTHW = self.vae.encode(video_BCFHW, chunk_frames, num_grey_frames)
            latent_BCTHW = latent_BCTHW.to(torch.float16)
            took_s = time.perf_counter() - begin_s
            return lambda: EncodedVideo(self._finite(latent_BCTHW, video_BCFHW), took_s)

        # there, encode, and back: each on its stream, in this order
        compute = torch.cuda.current_stream()
        with torch.cuda.stream(self._upload):
            pixels_BFHWC = host_BFHWC.to(self.device, non_blocking=True)
        compute.wait_stream(self._upload)
        pixels_BFHWC.record_stream(compute)
        begin, end, arrived = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        pixels_BCFHW = pixels_BFHWC.movedim(-1, 1)
        latent_BCTHW = self.vae.encode(pixels_BCFHW, chunk_frames, num_grey_frames)
        latent_BCTHW = latent_BCTHW.to(torch.float16)
        end.record()
        self._download.wait_stream(compute)
        result_BCTHW = torch.empty(latent_BCTHW.shape, dtype=torch.float16, pin_memory=True)
        with torch.cuda.stream(self._download):
            result_BCTHW.copy_(latent_BCTHW, non_blocking=True)
            arrived.record()
        latent_BCTHW.record_stream(self._download)

        def finish() -> EncodedVideo:
            arrived.synchronize()
            latents = self._finite(result_BCTHW, video_BCFHW)
            return EncodedVideo(latents, begin.elapsed_time(end) / 1e3)

        return finish

    def _finite(self, latent_BCTHW: Tensor, video_BCFHW: Tensor) -> np.ndarray[Any, Any]:
        latents: np.ndarray[Any, Any] = latent_BCTHW.numpy()
        if np.isfinite(latents).all():
            return latents
        pixels_BCFHW = video_BCFHW.to(self.device).float() / 127.5 - 1
        layer = overflowing_layer(self.vae, pixels_BCFHW) or "the normalised latent"
        raise VAEError(
            f"the VAE overflows in {self.spec.dtype}: {layer} is the first whose output is not "
            f'finite; set encode.dtype = "bfloat16" or "float32"'
        )

    def encode_text(self, prompts: list[str], batch_size: int) -> dict[str, EncodedText]:
        """{prompt: EncodedText} of every different prompt; in float32 those on which float16
        saturates.
        """
        with self.on_device(self.text.model):
            texts, saturated = self.text.encode(prompts, batch_size)
        if saturated:
            exact = self.text.in_float32()
            with self.on_device(exact.model):
                others = exact.encode(saturated, batch_size).texts
            texts |= {prompt: text._replace(in_float32=True) for prompt, text in others.items()}
        return texts


def check_memory(budget_gib: float) -> None:
    """Raises DeviceError without a GPU, or where the budget is more than it has in all."""
    if not torch.cuda.is_available():
        raise DeviceError(
            'encode.device = "cuda": this worker has no GPU that can be used; set '
            'encode.device = "cpu", or give the cluster nodes with GPUs'
        )
    total_gib = torch.cuda.get_device_properties().total_memory / 2**30
    if total_gib < budget_gib:
        raise DeviceError(
            f"encode.vae_memory_gib = {budget_gib:g}, but {torch.cuda.get_device_name()} has "
            f"{total_gib:.1f} GiB: lower it (the bytes of a dataset depend on it)"
        )


@lru_cache(maxsize=1)
def load_encoders(spec: EncodeSpec) -> Encoders:
    """The models of this process, loaded once."""
    return Encoders(spec)
