"""The layers of the Wan VAE's encoder, in plain PyTorch: the reference implementation, and what
runs on a CPU.

The encoder is causal in time. Frame 0 makes latent frame 0 by itself, and every four frames after
it make one more, so a clip is encoded in chunks: frame 0 alone, then several frames at a time. In
between, each convolution stores the last frames of its input in `past`. Where nothing is stored
the past is zeros, so the first frame needs only the last temporal tap of every 3x3x3 kernel: a
plain 2-D convolution, a third of the work.

Everything stays in channels_last (the layout of the tensor cores), where a norm over channels is
a norm over the last axis. Module names follow diffusers' AutoencoderKLWan, so its weights load as
they are. loader/vae/fused.py computes the same with fewer passes over memory, on a GPU.

Shapes: B batch, C channels, T frames, H height, W width, L = H * W, N = B * T.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# per convolution the last frames of its input so far; empty before the first frame
Past = dict[nn.Module, Tensor]


class CausalConv(nn.Conv3d):
    """A convolution over the present and the two frames before it, never over later ones."""

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """Convolve the next frames of a clip. A kernel of one frame needs no `past`."""
        if self.kernel_size[0] == 1:
            return super().forward(x_BCTHW)
        assert past is not None
        spatial = self.padding[1:]
        if self not in past:
            # the first frame: both taps on the past meet zeros, one 2-D convolution remains
            assert x_BCTHW.shape[2] == 1
            past[self] = F.pad(x_BCTHW, (0, 0, 0, 0, 1, 0))
            y_BCHW = F.conv2d(x_BCTHW[:, :, 0], self.weight[:, :, -1], self.bias, padding=spatial)
            return y_BCHW.unsqueeze(2)
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
        y_BTHWC = F.rms_norm(x_BTHWC, x_BTHWC.shape[-1:], self.gamma.flatten(), eps=1e-24)
        return y_BTHWC.movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, convolution, beside a shortcut (1x1 where the width changes)."""

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
        qkv_BTLC = F.linear(x_BTLC, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q_BTLC, k_BTLC, v_BTLC = qkv_BTLC.chunk(3, -1)
        # written out: torch's choice of kernels is one switch for all threads, and the trainer's
        # thread sets it at the same time
        weights_BTLL = (q_BTLC.float() * dim**-0.5 @ k_BTLC.float().mT).softmax(-1)
        x_BTLC = weights_BTLL.to(v_BTLC.dtype) @ v_BTLC
        x_BTLC = F.linear(x_BTLC, self.proj.weight.flatten(1), self.proj.bias)
        return x_BCTHW + x_BTLC.reshape(batch, frames, height, width, dim).movedim(-1, 1)


class MidBlock(nn.Module):
    """A residual block on either side of the attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([Attention(dim)])

    def forward(self, x_BCTHW: Tensor, past: Past) -> Tensor:
        x_BCTHW = self.attentions[0](self.resnets[0](x_BCTHW, past))
        return self.resnets[1](x_BCTHW, past)


class Downsample(nn.Module):
    """Halve height and width, and with `in_time` the frames after the first, which stays alone."""

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
    """Wan2.2's stage: residual blocks and a downsampling, beside a shortcut of means.

    The shortcut gathers time_factor x space_factor x space_factor neighbours into channels and
    averages groups of them, as diffusers' AvgDown3D does.
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
        return h_BCTHW.add_(group_mean(x_BCTHW, self.out_dim, self.time_factor, self.space_factor))


def group_mean(x_BCTHW: Tensor, out_dim: int, time_factor: int, space_factor: int) -> Tensor:
    """DownBlock's shortcut: [B, C, T, H, W] -> [B, out_dim, T / t, H / s, W / s] (T rounded up).

    Channel, time, row and column within a cell form C * t * s * s channels in that order; each
    output channel is the mean of the next group of them.
    """
    t, s = time_factor, space_factor
    if x_BCTHW.shape[2] % t:  # the first frame: its partner in the past is zero
        x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, t - 1, 0))
    batch, channels, frames, height, width = x_BCTHW.shape
    x_BCTtHhWw = x_BCTHW.reshape(batch, channels, frames // t, t, height // s, s, width // s, s)
    x_BCTtHW = x_BCTtHhWw.mean((5, 7)) if s > 1 else x_BCTtHhWw[..., 0, :, 0]
    # time goes into the channels, then groups of them average
    x_BCTHW = x_BCTtHW.transpose(2, 3).flatten(1, 2)
    return x_BCTHW.unflatten(1, (out_dim, -1)).mean(2)


class Encoder(nn.Module):
    """Pixels (in patches, where the VAE takes patches) to mean and log variance, 2 z channels."""

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
            # Wan2.2 nests its blocks in a DownBlock, Wan2.1 lists them one by one
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
        """Encode the next frames: one where `past` is empty, then 4n."""
        x_BCTHW = self.conv_in(x_BCTHW, past)
        for block in self.down_blocks:
            x_BCTHW = block(x_BCTHW, past)
        x_BCTHW = self.mid_block(x_BCTHW, past)
        return self.conv_out(F.silu(self.norm_out(x_BCTHW), inplace=True), past)
