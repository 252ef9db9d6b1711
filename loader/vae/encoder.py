"""The Wan VAE's encoder, the fast one: pixels to normalised latents, at half the memory traffic
of the reference.

The encoder is causal in time. Frame 0 makes latent frame 0 by itself, and every four frames after
it make one more, so a clip is worked off in chunks: frame 0 alone, then `chunk_frames` at a time,
each convolution keeping the last frames of its input in `past`. Where `past` is empty the past is
zeros, so the first frame needs only the last temporal tap of every 3x3x3 kernel: a plain 2-D
convolution, a third of the work. That makes `latent[:, :1]` of a clip the encoding of its first
frame by construction, whatever the chunk size.

Everything stays in channels_last (the layout of the tensor cores), where a norm over channels is
a norm over the last axis. Module names follow diffusers' AutoencoderKLWan, so its weights load as
they are. Left out: the decoder, tiling, the posterior's variance (shards hold the mean) and
attention scales, which no Wan model uses.

Shapes: B batch, C channels, T frames, H height, W width.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

# per convolution the last frames of its input so far; empty before the first frame
Past = dict[nn.Module, Tensor]


class VAEError(ValueError):
    """The VAE folder or the video can't be used; the message names the file or shape and the way
    out.
    """


class CausalConv(nn.Conv3d):
    """A convolution that sees the past only: zeros, or the two frames that the last chunk left."""

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        if self.kernel_size[0] == 1:
            return super().forward(x_BCTHW)
        assert past is not None
        spatial = self.padding[1:]
        if self not in past:  # the first frame: both taps on the past meet zeros
            assert x_BCTHW.shape[2] == 1
            past[self] = F.pad(x_BCTHW, (0, 0, 0, 0, 1, 0))
            return F.conv2d(
                x_BCTHW[:, :, 0], self.weight[:, :, -1], self.bias, padding=spatial
            ).unsqueeze(2)
        x_BCTHW = torch.cat([past[self], x_BCTHW], 2)
        past[self] = x_BCTHW[:, :, -2:].clone()
        return F.conv3d(x_BCTHW, self.weight, self.bias, padding=(0, *spatial))


class Norm(nn.Module):
    """RMS norm over channels; `gamma` has diffusers' shape [C, 1, 1] or [C, 1, 1, 1]."""

    def __init__(self, dim: int, num_axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BTHWC = x_BCTHW.movedim(1, -1)
        return F.rms_norm(x_BTHWC, x_BTHWC.shape[-1:], self.gamma.flatten(), eps=1e-24).movedim(
            -1, 1
        )


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = Norm(in_dim)
        self.conv1 = CausalConv(in_dim, out_dim, 3, padding=1)
        self.norm2 = Norm(out_dim)
        self.conv2 = CausalConv(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = CausalConv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW), inplace=True), past)
        h_BCTHW = self.conv2(F.silu(self.norm2(h_BCTHW), inplace=True), past)
        return h_BCTHW.add_(self.conv_shortcut(x_BCTHW))


class Attention(nn.Module):
    """Single-head attention among the positions of one frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, num_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        batch, dim, frames, height, width = x_BCTHW.shape
        x_BTLC = self.norm(x_BCTHW).movedim(1, -1).reshape(batch, frames, height * width, dim)
        q_BTLC, k_BTLC, v_BTLC = F.linear(
            x_BTLC, self.to_qkv.weight.flatten(1), self.to_qkv.bias
        ).chunk(3, -1)
        # written out: torch's choice of kernels is one switch for all threads, and the trainer's
        # holds it meanwhile
        weights_BTLL = (q_BTLC.float() * dim**-0.5 @ k_BTLC.float().mT).softmax(-1)
        x_BTLC = weights_BTLL.to(v_BTLC.dtype) @ v_BTLC
        x_BTLC = F.linear(x_BTLC, self.proj.weight.flatten(1), self.proj.bias)
        return x_BCTHW + x_BTLC.reshape(batch, frames, height, width, dim).movedim(-1, 1)


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        x_BCTHW = self.attentions[0](self.resnets[0](x_BCTHW, past))
        return self.resnets[1](x_BCTHW, past)


class Downsample(nn.Module):
    """Halve height and width, and with `in_time` the frames; the first frame of all stands for
    itself.
    """

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        # the identity keeps diffusers' name for the convolution, resample.1
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        batch, _, frames = x_BCTHW.shape[:3]
        x_NCHW = F.pad(x_BCTHW.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
        x_BCTHW = self.resample(x_NCHW).unflatten(0, (batch, frames)).transpose(1, 2)
        if self.time_conv is None:
            return x_BCTHW
        last_BCTHW, past[self] = past.get(self), x_BCTHW[:, :, -1:].clone()
        if last_BCTHW is None:
            assert frames == 1
            return x_BCTHW
        return self.time_conv(torch.cat([last_BCTHW, x_BCTHW], 2))


class DownBlock(nn.Module):
    """Wan2.2's stage: residual blocks and a downsampling, beside a shortcut that averages groups
    of channels.
    """

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, downsample: bool, in_time: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(num_blocks)]
        )
        self.downsampler = Downsample(out_dim, in_time) if downsample else None
        self.time_factor, self.space_factor = 1 + in_time, 1 + downsample
        self.out_dim = out_dim

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        h_BCTHW = x_BCTHW
        for block in self.resnets:
            h_BCTHW = block(h_BCTHW, past)
        if self.downsampler is not None:
            h_BCTHW = self.downsampler(h_BCTHW, past)
        return h_BCTHW.add_(self._shortcut(x_BCTHW))

    def _shortcut(self, x_BCTHW: Tensor) -> Tensor:
        t, s = self.time_factor, self.space_factor
        if x_BCTHW.shape[2] % t:  # the first frame: its partner in the past is zero
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, t - 1, 0))
        batch, channels, frames, height, width = x_BCTHW.shape
        x_BCTtHhWw = x_BCTHW.reshape(batch, channels, frames // t, t, height // s, s, width // s, s)
        x_BCTtHW = x_BCTtHhWw.mean((5, 7)) if s > 1 else x_BCTtHhWw[..., 0, :, 0]
        # time goes into the channels, then groups of them average
        x_BCTHW = x_BCTtHW.transpose(2, 3).flatten(1, 2)
        return x_BCTHW.unflatten(1, (self.out_dim, -1)).mean(2)


class Encoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        dim: int,
        z_dim: int,
        dim_mult: tuple[int, ...],
        num_blocks: int,
        in_time: tuple[bool, ...],
        is_residual: bool,
    ):
        super().__init__()
        dims = [dim, *(dim * multiple for multiple in dim_mult)]
        last = len(dim_mult) - 1
        self.conv_in = CausalConv(in_channels, dim, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise(dims)):
            if is_residual:
                self.down_blocks.append(
                    DownBlock(a, b, num_blocks, i < last, i < last and in_time[i])
                )
            else:
                self.down_blocks.extend(ResidualBlock(b if j else a, b) for j in range(num_blocks))
                if i < last:
                    self.down_blocks.append(Downsample(b, in_time[i]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = Norm(dims[-1])
        self.conv_out = CausalConv(dims[-1], 2 * z_dim, 3, padding=1)

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        x_BCTHW = self.conv_in(x_BCTHW, past)
        for block in self.down_blocks:
            x_BCTHW = block(x_BCTHW, past)
        x_BCTHW = self.mid_block(x_BCTHW, past)
        return self.conv_out(F.silu(self.norm_out(x_BCTHW), inplace=True), past)


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
                f"vae/config.json: attn_scales {config.attn_scales} is not supported (no Wan VAE has any)"
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

    @torch.inference_mode()
    def encode(self, video_BCTHW: Tensor, chunk_frames: int = 16) -> Tensor:
        """Encode pixels in [-1, 1], [B, 3, 4n+1, H, W], to the normalised posterior mean [B, z,
        n+1, H/f, W/f].

        Works and returns in the encoder's dtype, on its device. `chunk_frames`, a multiple of 4,
        trades memory for speed and doesn't change the result beyond rounding. Raises VAEError for
        another shape.
        """
        _, _, frames, height, width = video_BCTHW.shape
        if frames % 4 != 1 or height % self.space_factor or width % self.space_factor:
            raise VAEError(
                f"a video of {width}x{height}x{frames} can't be encoded: it takes 4n+1 frames and sides in "
                f"multiples of {self.space_factor}"
            )
        assert chunk_frames % 4 == 0
        weight, bias = self.quant_conv.weight, self.quant_conv.get_parameter("bias")[: self.z_dim]
        past: Past = {}
        means = []
        for start, end in [
            (0, 1),
            *((i, i + chunk_frames) for i in range(1, frames, chunk_frames)),
        ]:
            x_BCTHW = video_BCTHW[:, :, start:end].to(weight.device, weight.dtype)
            if self.patch_size > 1:
                x_BCTHW = _patchify(x_BCTHW, self.patch_size)
            x_BCTHW = self.encoder(x_BCTHW.contiguous(memory_format=torch.channels_last_3d), past)
            means.append(F.conv3d(x_BCTHW, weight[: self.z_dim], bias))
        mean_BCTHW = torch.cat(means, 2).float()
        return ((mean_BCTHW - self.mean_C111) / self.std_C111).to(weight.dtype).contiguous()


def _patchify(x_BCTHW: Tensor, size: int) -> Tensor:
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
        encoder = VAEEncoder(config)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise VAEError(
                f"{folder}: no .safetensors file; expected the vae folder of a Wan model for diffusers"
            )
        weights: dict[str, Any] = {}
        for file in files:
            weights |= {
                name: tensor
                for name, tensor in load_file(file).items()
                if name.startswith(("encoder.", "quant_conv."))
            }
        encoder.load_state_dict(weights)
    except (OSError, msgspec.MsgspecError, RuntimeError) as error:
        raise VAEError(
            f"{folder}: not the VAE of a Wan model in diffusers' layout: {error}"
        ) from error
    encoder = encoder.requires_grad_(False).eval().to(device, dtype)
    encoder.mean_C111, encoder.std_C111 = encoder.mean_C111.float(), encoder.std_C111.float()
    for module in encoder.modules():  # 4-D and 5-D weights have two names for the same layout
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
    return encoder
