"""Both models of a worker: the VAE and the text encoder, one on the device at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from loader.vae.encoder import load_vae_encoder
from shardgen.encode.text import EncodedText, TextEncoder
from shardgen.encode.unit import EncodeSpec
from shardgen.media.decode import Frames


class DeviceError(ValueError):
    """A worker can't use the device; the message says which and what to do."""


class Encoders:
    """Both models. Their weights stay on the CPU; `on_device` lends one of them the device.
    Raises DeviceError.
    """

    def __init__(self, spec: EncodeSpec) -> None:
        if spec.device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                'encode.device = "cuda": this worker has no GPU that can be used; set '
                'encode.device = "cpu", or give the cluster nodes with GPUs'
            )
        torch.set_num_threads(spec.threads)
        # a timed choice of algorithm would change bytes from run to run
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        transformers.utils.logging.disable_progress_bar()
        self.device, self.dtype = torch.device(spec.device), getattr(torch, spec.dtype)
        self.vae = load_vae_encoder(Path(spec.model), "cpu", self.dtype)
        self.text = TextEncoder(Path(spec.model), self.device, self.dtype)

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

    @torch.inference_mode()
    def encode_video(self, windows: list[Frames]) -> np.ndarray[Any, Any]:
        """float16 [B, 48, T, H/16, W/16] of B windows uint8 [F, H, W, 3]. The VAE must be on the
        device.
        """
        pixels_BFHWC = torch.from_numpy(np.stack(windows)).to(self.device)
        video_BCFHW = (pixels_BFHWC.movedim(-1, 1).float() / 127.5 - 1).to(self.dtype)
        latent_BCTHW = self.vae.encode(video_BCFHW)
        return latent_BCTHW.to(torch.float16).cpu().numpy()

    def encode_text(self, prompts: list[str], batch_size: int) -> dict[str, EncodedText]:
        """{prompt: EncodedText} of every different prompt."""
        with self.on_device(self.text.model):
            return self.text.encode(prompts, batch_size)


@lru_cache(maxsize=1)
def load_encoders(spec: EncodeSpec) -> Encoders:
    """The models of this process, loaded once."""
    return Encoders(spec)
