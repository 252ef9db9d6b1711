"""KEY.jpg or KEY.mp4 to pixels in [-1, 1], by DALI: on the GPU (nvJPEG, NVDEC) or, without one,
on the CPU.

One pipeline: encoded bytes in, decoded and normalised frames out, handed to torch by DLPack, so
that on a GPU no pixel is ever in host memory. DALI fails a whole batch for one bad file and may
leave the pipeline broken. Then the pipeline is rebuilt and the files are tried one by one: the
bad one comes back as a DecodeError, the others as frames.

Left out: DALI's readers (ours verifies the bytes first), resizing, cropping and noise beside a
stored latent (the frame would no longer be that latent's; a shard's frames have their bucket's
size already), and DALI's checkpoints (its video decoder has none; where we are is the feed's to
know). Without a GPU it decodes JPEG, and of video VP8, VP9 and MJPEG.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Literal

import msgspec
import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from loader.sample import is_bt709
from loader.shape import Bucket
from loader.vae.encoder import VAEEncoder

Container = Literal["jpg", "mp4"]
_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}


def _yuv_to_rgb(red: float, blue: float) -> Tensor:
    """[3, 3] from luma and two colour differences to RGB, for the weights of red and blue in
    luma.
    """
    green = 1 - red - blue
    return torch.tensor(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


# grey stays grey, so this holds for RGB in [-1, 1] as for any other scale
_BT601_TO_BT709 = _yuv_to_rgb(0.2126, 0.0722) @ torch.linalg.inv(_yuv_to_rgb(0.299, 0.114))
# levels by which DALI's CUDA kernel is off in RGB: black is 255 / 16 to it and grey chroma 255 /
# 2, not 16 and 128
_CUDA_BIAS = (1.164 / 16 + 1.596 / 2, 1.164 / 16 - (0.813 + 0.392) / 2, 1.164 / 16 + 2.017 / 2)


class DecodeError(ValueError):
    """A file that DALI can't decode, or that does not hold what it should."""


class FrameDecoder:
    """Decodes the first `num_frames` frames of files of one kind to [3, num_frames, H, W] in [-1,
    1].

    `dtype` float16 or float32; frames are ready on torch's current stream. `crop_px` (height,
    width) cuts out the middle. `bt709` says which matrix a video's colours have, for DALI takes
    all of them as BT.601. Not thread-safe.
    """

    def __init__(
        self,
        container: Container,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_batch: int,
        num_frames: int = 1,
        crop_px: tuple[int, int] | None = None,
        bt709: bool = True,
        num_threads: int = 1,
    ):
        self._container, self._device, self._dtype = container, device, dtype
        self._max_batch, self._num_frames, self._num_threads = max_batch, num_frames, num_threads
        self._crop_px = crop_px
        self._from_bt601 = (_BT601_TO_BT709 if bt709 else torch.eye(3)).to(device)
        self._pipeline = self._build()

    def _build(self) -> Pipeline:
        gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._max_batch,
            num_threads=self._num_threads,
            prefetch_queue_depth=1,
            device_id=torch.cuda.current_device() if gpu else None,
        )
        decoder = "mixed" if gpu else "cpu"
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            if self._container == "jpg":
                frames = fn.decoders.image(
                    encoded,
                    device=decoder,
                    output_type=types.RGB,
                    affine=False,
                    jpeg_fancy_upsampling=True,
                )
            else:
                frames = fn.decoders.video(
                    encoded,
                    device=decoder,
                    sequence_length=self._num_frames,
                    affine=False,
                    pad_mode="none",
                    build_index=False,
                )
            bias = _CUDA_BIAS if gpu and self._container == "mp4" else (0, 0, 0)
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    frames,
                    crop=self._crop_px,
                    dtype=_DTYPES[self._dtype],
                    output_layout="CHW" if self._container == "jpg" else "FCHW",
                    mean=[127.5 + levels for levels in bias],
                    std=[127.5] * 3,
                )
            )
        pipeline.build()
        return pipeline

    def decode(self, files: Sequence[bytes | memoryview]) -> list[Tensor | DecodeError]:
        """Frames of each file in turn, or why there are none. At most `max_batch` files."""
        try:
            return list(self._run(files))
        except RuntimeError:
            self._pipeline = self._build()
        return [self._decode_alone(file) for file in files]

    def _decode_alone(self, file: bytes | memoryview) -> Tensor | DecodeError:
        try:
            return self._run([file])[0]
        except RuntimeError as error:
            self._pipeline = self._build()
            return DecodeError(_last_sentence(error) + self._advice)

    @property
    def _advice(self) -> str:
        if self._container == "jpg" or self._device.type == "cuda":
            return ""
        return (
            " (DALI decodes H.264 on a GPU only: without one, build the dataset with first frames, "
            "KEY.jpg, stored)"
        )

    def _run(self, files: Sequence[bytes | memoryview]) -> list[Tensor]:
        self._pipeline.feed_input("encoded", [np.frombuffer(file, np.uint8) for file in files])
        stream = torch.cuda.current_stream().cuda_stream if self._device.type == "cuda" else None
        (outputs,) = self._pipeline.run(stream)
        frames = [from_dlpack(output) for output in outputs]
        if self._container == "jpg":
            return [frame.unsqueeze(1) for frame in frames]
        return [
            torch.einsum("dc,fchw->dfhw", self._from_bt601, frame.float())
            .clamp_(-1, 1)
            .to(self._dtype)
            for frame in frames
        ]


def _last_sentence(error: RuntimeError) -> str:
    """DALI's messages are pages with tracebacks of the pipeline's definition; the cause follows
    "encountered:".
    """
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "DALI gave no reason"


class FirstFrames:
    """Raw frames to latents, one file at a time, so that a latent doesn't depend on who shares
    its batch.

    One per rank; safe to use from several threads, of which one gets in at a time. `encode` is
    TI2V-5B's conditioning: the latent of frame 0 replaces that of the clip. A14B's I2V model
    instead takes 20 more channels, a mask and the latent of a whole clip that is grey after frame
    0: `VAEEncoder.encode` makes that latent from this class's pixels; the mask and the wider
    input are the model's, and neither is written.
    """

    def __init__(self, vae: VAEEncoder, device: torch.device):
        self._vae, self._device = vae, device
        half = next(vae.parameters()).dtype == torch.float16
        self._dtype = torch.float16 if half else torch.float32  # DALI has no bfloat16
        self._decoders: dict[tuple[Container, Bucket | None], FrameDecoder] = {}
        self._lock = Lock()

    def encode(self, container: Container, file: bytes, bucket: Bucket) -> Tensor | DecodeError:
        """The latent [48, 1, h, w] of the file's first frame, in the VAE's dtype, or why there is
        none.

        A video is shardgen's, whose colours are BT.709.
        """
        with self._lock:
            if (container, None) not in self._decoders:
                self._decoders[container, None] = FrameDecoder(
                    container, self._device, self._dtype, max_batch=1
                )
            return self._encode(
                self._decoders[container, None], file, msgspec.structs.replace(bucket, num_frames=1)
            )

    def encode_clip(
        self, container: Container, file: bytes, bucket: Bucket
    ) -> Tensor | DecodeError:
        """The latent [48, T, h, w] of the file's first frames, cropped to the bucket, where no
        latent is stored.

        Its colours are what players assume of its size: BT.709 above 576 lines or from 1280
        columns, else BT.601.
        """
        with self._lock:
            if (container, bucket) not in self._decoders:
                self._decoders[container, bucket] = FrameDecoder(
                    container,
                    self._device,
                    self._dtype,
                    max_batch=1,
                    num_frames=bucket.num_frames,
                    crop_px=(bucket.height_px, bucket.width_px),
                    bt709=is_bt709(bucket.width_px, bucket.height_px),
                )
            return self._encode(self._decoders[container, bucket], file, bucket)

    def _encode(self, decoder: FrameDecoder, file: bytes, expected: Bucket) -> Tensor | DecodeError:
        pixels_CTHW = decoder.decode([file])[0]
        if isinstance(pixels_CTHW, DecodeError):
            return pixels_CTHW
        frames, height, width = pixels_CTHW.shape[1:]
        if (width, height, frames) != (expected.width_px, expected.height_px, expected.num_frames):
            return DecodeError(f"it decodes to {width}x{height}x{frames}, not to {expected}")
        latent_CTHW = self._vae.encode(pixels_CTHW.unsqueeze(0))[0]
        # the pixels are DALI's memory, to be used again once we let go of them
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return latent_CTHW
