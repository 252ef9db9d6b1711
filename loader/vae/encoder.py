"""The Wan VAE's encoder: pixels to normalised latents, for Wan2.2 (z 48) and Wan2.1 (z 16).

A clip is encoded in chunks: frame 0 alone, then `chunk_frames` at a time (by the layers of
loader/vae/blocks.py, or by loader/vae/fused.py on a GPU). That makes `latent[:, :1]` of a clip the
encoding of its first frame by construction, whatever the chunk size.

Left out: the decoder, tiling, the posterior's variance (shards hold the mean) and attention scales,
which no Wan model uses.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loader.vae.blocks import CausalConv, Encoder, Past
from loader.vae.fused import encode_chunk


class VAEError(ValueError):
    """The VAE folder or the video can't be used; the message names the file or shape and what to
    do.
    """


class VAEConfig(msgspec.Struct, frozen=True):
    """What the encoder needs of vae/config.json; the defaults are diffusers' (Wan2.1)."""

    latents_mean: list[float]
    latents_std: list[float]
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: int = 3
    patch_size: int | None = None


class VAEEncoder(nn.Module):
    """Pixels to latents. Build it with `load_vae_encoder`."""

    mean_C111: Tensor
    std_C111: Tensor

    def __init__(self, config: VAEConfig):
        super().__init__()
        if config.attn_scales:
            raise VAEError(
                f"vae/config.json: attn_scales {config.attn_scales} is not supported (no Wan VAE "
                f"has any)"
            )
        self.patch_size = config.patch_size or 1
        self.z_dim = config.z_dim
        # how many pixels one latent position covers on each side
        self.space_factor = self.patch_size * 2 ** (len(config.dim_mult) - 1)
        self.encoder = Encoder(
            config.in_channels,
            config.base_dim,
            config.z_dim,
            config.dim_mult,
            config.num_res_blocks,
            config.temperal_downsample,
            config.is_residual,
        )
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.register_buffer(
            "mean_C111", torch.tensor(config.latents_mean).view(-1, 1, 1, 1), persistent=False
        )
        self.register_buffer(
            "std_C111", torch.tensor(config.latents_std).view(-1, 1, 1, 1), persistent=False
        )

    @property
    def stage_bytes_per_pixel(self) -> float:
        """Bytes of one tensor of the first stage, for each pixel of a frame."""
        weight = self.encoder.conv_in.weight
        return weight.shape[0] * weight.element_size() / self.patch_size**2

    @torch.inference_mode()
    def encode(
        self, video_BCTHW: Tensor, chunk_frames: int = 16, num_grey_frames: int = 0
    ) -> Tensor:
        """Encode pixels in [-1, 1], or uint8 ones, [B, 3, 4n+1, H, W], to the normalised posterior
        mean [B, z, n+1, H/f, W/f].

        Works and returns in the encoder's dtype, on its device. `chunk_frames`, a multiple of 4,
        trades memory for speed and doesn't change the result beyond rounding. With
        `num_grey_frames`, 4m, the video is a first frame alone and so many grey ones (0.0 in [-1,
        1]) follow it: what I2V-A14B is given. Its latent frame 0 is that of the whole clip, because
        both encode frame 0 by itself. Raises VAEError for another shape.
        """
        assert num_grey_frames == 0 or video_BCTHW.shape[2] == 1
        _, _, frames, height, width = video_BCTHW.shape
        frames += num_grey_frames
        if frames % 4 != 1 or height % self.space_factor or width % self.space_factor:
            raise VAEError(
                f"a video of {width}x{height}x{frames} can't be encoded: it takes 4n+1 frames and "
                f"sides in multiples of {self.space_factor}"
            )
        assert chunk_frames % 4 == 0
        weight, bias = self.quant_conv.weight, self.quant_conv.get_parameter("bias")[: self.z_dim]
        past: Past = {}
        means = []
        for start in (0, *range(1, frames, chunk_frames)):
            end = min(start + chunk_frames, frames) if start else 1
            if start and num_grey_frames:
                grey_shape = (*video_BCTHW.shape[:2], end - start, height, width)
                pixels_BCTHW = torch.zeros(grey_shape, dtype=weight.dtype, device=weight.device)
            else:
                pixels_BCTHW = video_BCTHW[:, :, start:end].to(weight.device)
            if pixels_BCTHW.dtype == torch.uint8:
                pixels_BCTHW = pixels_BCTHW.float() / 127.5 - 1
            pixels_BCTHW = pixels_BCTHW.to(weight.dtype)
            x_BCTHW = self._encode_chunk(pixels_BCTHW, past, is_last=end == frames)
            means.append(F.conv3d(x_BCTHW, weight[: self.z_dim], bias))
        mean_BCTHW = torch.cat(means, 2).float()
        return ((mean_BCTHW - self.mean_C111) / self.std_C111).to(weight.dtype).contiguous()

    def _encode_chunk(self, pixels_BCTHW: Tensor, past: Past, is_last: bool) -> Tensor:
        """The encoder's output for the next frames, [B, 2 z, T, H/f, W/f]."""
        if pixels_BCTHW.is_cuda:
            return encode_chunk(self.encoder, pixels_BCTHW, self.patch_size, past, is_last)
        return self.encode_by_layers(pixels_BCTHW, past)

    def encode_by_layers(self, pixels_BCTHW: Tensor, past: Past) -> Tensor:
        """What the fused encoder computes, by the reference implementation: the next frames (one
        where `past` is empty, then 4n), to [B, 2 z, T, H/f, W/f].
        """
        weight = self.quant_conv.weight
        pixels_BCTHW = pixels_BCTHW.to(weight.device, weight.dtype)
        if self.patch_size > 1:
            pixels_BCTHW = patchify(pixels_BCTHW, self.patch_size)
        x_BCTHW = pixels_BCTHW.contiguous(memory_format=torch.channels_last_3d)
        return self.encoder(x_BCTHW, past)


def patchify(x_BCTHW: Tensor, size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C*size*size, T, H/size, W/size]; within a channel the column varies
    slowest.
    """
    x_BCTHhWw = x_BCTHW.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return x_BCTHhWw.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def load_vae_encoder(model_dir: Path, device: torch.device | str, dtype: torch.dtype) -> VAEEncoder:
    """Read MODEL/vae (config.json and safetensors in diffusers' layout); the decoder's weights
    are passed over.

    Raises VAEError when a file is missing or does not fit the config.
    """
    folder = model_dir / "vae"
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=VAEConfig)
        _check_config(config, folder)
        encoder = VAEEncoder(config)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise VAEError(
                f"{folder}: no .safetensors file; expected the vae folder of a Wan model for "
                f"diffusers"
            )
        weights: dict[str, Any] = {}
        for file in files:
            weights |= {
                name: tensor
                for name, tensor in load_file(file).items()
                if name.startswith(("encoder.", "quant_conv."))
            }
        _check_tensors(encoder, weights, folder)
        encoder.load_state_dict(weights)
    except (OSError, msgspec.MsgspecError, SafetensorError, RuntimeError) as error:
        raise VAEError(
            f"{folder}: not the VAE of a Wan model in diffusers' layout: {error}; download the "
            f"model again"
        ) from error
    encoder = encoder.requires_grad_(False).eval().to(device, dtype)
    encoder.mean_C111, encoder.std_C111 = encoder.mean_C111.float(), encoder.std_C111.float()
    for module in encoder.modules():  # 4-D and 5-D weights have two names for the same layout
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
    return encoder


def _check_config(config: VAEConfig, folder: Path) -> None:
    """Raises VAEError where the values contradict each other, which would show in the first encode,
    or never: one deviation would do for all channels.
    """
    problem = ""
    for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
        if len(values) != config.z_dim:
            problem = f"latents_{name} has {len(values)} numbers, z_dim is {config.z_dim}"
    if min(config.latents_std, default=0.0) <= 0.0:
        problem = problem or "latents_std holds a number that is not above 0"
    patch_size = 1 if config.patch_size is None else config.patch_size
    if patch_size < 1 or config.in_channels != 3 * patch_size**2:
        problem = (
            f"in_channels is {config.in_channels}, which is not 3 colours of patches with "
            f"patch_size {config.patch_size}"
        )
    if len(config.temperal_downsample) < len(config.dim_mult) - 1:
        problem = (
            f"temperal_downsample has {len(config.temperal_downsample)} entries for the "
            f"{len(config.dim_mult)} stages of dim_mult"
        )
    if problem:
        raise VAEError(f"{folder / 'config.json'}: {problem}; download the model again")


def _check_tensors(encoder: VAEEncoder, weights: dict[str, Tensor], folder: Path) -> None:
    """Raises VAEError where they are not those of the encoder."""
    own = encoder.state_dict()
    faults = {
        "missing": own.keys() - weights.keys(),
        "unknown": weights.keys() - own.keys(),
        "of another shape": {
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        },
    }
    if any(faults.values()):
        found = ", ".join(
            f"{len(names)} {what} {sorted(names)[:2]}" for what, names in faults.items() if names
        )
        raise VAEError(
            f"{folder}: its tensors are not those of its config.json: {found}; download the model "
            f"again"
        )
