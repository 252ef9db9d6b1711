"""The Wan2.2-TI2V-5B transformer (DiT), lean: what training with a frozen base needs. It knows
nothing of LoRA.

Three things differ from the diffusers model, and none of them changes the result:

- A sample has at most two distinct timesteps: t, and 0 for the tokens of a clean first frame. So
  the modulation is two rows per sample and a boundary index, not a row per token (0.8 GB in fp32
  at 1280x704x49).
- Linear layers that read the same input are one GEMM (`Projections`).
- The residual stream, norms and modulation stay in float32; only GEMM and attention inputs are in
  the compute dtype.

Left out: image cross-attention (Wan2.1 I2V), and dropout, which Wan does not use.

Shapes: B samples, L video tokens, S text tokens (512), D model width, H heads, C latent channels,
T/h/w latent frames, rows and columns, R = 2 modulation rows (0: the clean first frame at t = 0;
1: the rest). Source of names and constants: diffusers' transformer_wan.py, version 0.42.
"""

import math
from collections.abc import Callable, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.kernels.pointwise import Rows, gelu_tanh, residual_norm, split_norm_rope
from train.model.attention import Attention

# how a block is run: see train/activations/plan.py
RunBlock = Callable[..., tuple[Tensor, Tensor]] | None


class WanConfig(msgspec.Struct, frozen=True):
    """transformer/config.json of the diffusers folder; keys that training does not need are
    ignored.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    cross_attn_norm: bool = True
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


TI2V_5B = WanConfig(
    num_layers=30,
    num_attention_heads=24,
    attention_head_dim=128,
    in_channels=48,
    out_channels=48,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=14336,
)


class Projections(nn.Module):
    """Linear layers that read the same input, as one GEMM: [..., in] -> [..., sum(out)].

    `names` are the layers' names in the diffusers block, in the order of their rows, `sizes`
    their output widths. Whoever makes the input leaves `num_spare` columns free behind each of
    its rows; an adapter asks for some.
    """

    num_spare = 0

    def __init__(self, in_features: int, layers: dict[str, int]):
        super().__init__()
        self.names, self.sizes = tuple(layers), tuple(layers.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes)))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """With `gelu` x goes through GELU first: an adapter does both in one pass."""
        return F.linear(gelu_tanh(x) if gelu else x, self.weight, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.qkv = Projections(dim, {"attn1.to_q": dim, "attn1.to_k": dim, "attn1.to_v": dim})
        self.out = Projections(dim, {"attn1.to_out.0": dim})
        self.norm_q, self.norm_k = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        q_BLD, k_BLD, v_BLD = split_norm_rope(
            self.qkv(x_BLD), (self.norm_q, self.norm_k), rope, self.num_heads, self.eps
        )
        out: Tensor = self.out(
            attend(q_BLD, k_BLD, v_BLD, self.num_heads, attention, self.out.num_spare)
        )
        return out


class CrossAttention(nn.Module):
    """Not masked: diffusers pads the text with zero rows and lets every query see them."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.q = Projections(dim, {"attn2.to_q": dim})
        self.kv = Projections(dim, {"attn2.to_k": dim, "attn2.to_v": dim})
        self.out = Projections(dim, {"attn2.to_out.0": dim})
        self.norm_q, self.norm_k = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, attention: Attention) -> Tensor:
        (q_BLD,) = split_norm_rope(self.q(x_BLD), (self.norm_q,), None, self.num_heads, self.eps)
        k_BSD, v_BSD = split_norm_rope(
            self.kv(text_BSD), (self.norm_k,), None, self.num_heads, self.eps
        )
        out: Tensor = self.out(
            attend(q_BLD, k_BSD, v_BSD, self.num_heads, attention, self.out.num_spare)
        )
        return out


class FeedForward(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.up = Projections(config.dim, {"ffn.net.0.proj": config.ffn_dim})
        self.down = Projections(config.ffn_dim, {"ffn.net.2": config.dim})

    def forward(self, x_BLD: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x_BLD), gelu=True)
        return out


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward. What the feed-forward adds to the stream is
    left to whoever comes next, because its norm reads the stream anyway: [B, L, D] float32 and
    what the last block left -> the same two.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        self.attn1, self.attn2, self.ffn = (
            SelfAttention(config),
            CrossAttention(config),
            FeedForward(config),
        )
        self.norm2_weight = nn.Parameter(torch.empty(config.dim))
        self.norm2_bias = nn.Parameter(torch.empty(config.dim))
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.dim))
        self.eps = config.eps

    def forward(
        self,
        x_BLD: Tensor,
        left_BLD: Tensor | None,
        left_gate_BRD: Tensor | None,
        text_BSD: Tensor,
        tables_BR6D: Tensor,
        boundary_B: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: Attention,
    ) -> tuple[Tensor, Tensor]:
        """`left_BLD` (None in the first block) is to be added times `left_gate_BRD`; tables:
        `modulation_tables`.
        """
        shift1, scale1, gate1, shift3, scale3, _ = (
            Rows(rows, boundary_B) for rows in tables_BR6D.unbind(2)
        )
        left_gate = None if left_gate_BRD is None else Rows(left_gate_BRD, boundary_B)
        dtype, eps = text_BSD.dtype, self.eps
        x_BLD, h_BLD = residual_norm(
            x_BLD, left_BLD, left_gate, shift1, scale1, eps, dtype, self.attn1.qkv.num_spare
        )
        x_BLD, h_BLD = residual_norm(
            x_BLD,
            self.attn1(h_BLD, rope, attention),
            gate1,
            Rows(self.norm2_bias, None),
            Rows(self.norm2_weight, None),
            eps,
            dtype,
            self.attn2.q.num_spare,
        )
        x_BLD, h_BLD = residual_norm(
            x_BLD,
            self.attn2(h_BLD, text_BSD, attention),
            None,
            shift3,
            scale3,
            eps,
            dtype,
            self.ffn.up.num_spare,
        )
        return x_BLD, self.ffn(h_BLD)


class Wan(nn.Module):
    """The whole transformer. Build it on the meta device and fill it with
    train.model.load.load_transformer.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        self.config = config
        dim, patch = config.dim, math.prod(config.patch_size)
        self.patch_embedding = Projections(config.in_channels * patch, {"patch_embedding": dim})
        self.time_1 = Projections(
            config.freq_dim, {"condition_embedder.time_embedder.linear_1": dim}
        )
        self.time_2 = Projections(dim, {"condition_embedder.time_embedder.linear_2": dim})
        self.time_proj = Projections(dim, {"condition_embedder.time_proj": 6 * dim})
        self.text_1 = Projections(
            config.text_dim, {"condition_embedder.text_embedder.linear_1": dim}
        )
        self.text_2 = Projections(dim, {"condition_embedder.text_embedder.linear_2": dim})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = Projections(dim, {"proj_out": config.out_channels * patch})
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def forward(
        self,
        latent_BCThw: Tensor,
        t_BR: Tensor,
        num_clean_frames_B: Tensor,
        text_BSD: Tensor,
        attention: Attention,
        run_block: RunBlock = None,
    ) -> Tensor:
        """Predict the velocity.

        latent_BCThw: noised latent, any float dtype. t_BR: float32 timesteps 0..1000 of the two
        modulation rows. num_clean_frames_B: int64, latent frames at the start that use row 0
        (I2V: 1, else 0). text_BSD: UMT5 rows, padded with zero rows to 512 **before** this call.
        `run_block(index, block, *inputs)` says what each block keeps for the backward pass
        (train/activations/plan.py); None: everything. Returns float32 [B, C, T, h, w].
        """
        dtype = self.patch_embedding.weight.dtype
        x_BLD = self.patch_embedding(
            patchify(latent_BCThw, self.config.patch_size).to(dtype)
        ).float()
        frames, rows, columns = latent_grid(latent_BCThw.shape, self.config.patch_size)
        boundary_B = num_clean_frames_B * (rows * columns)
        time_BRD = self.time_2(F.silu(self.time_1(timestep_embedding(t_BR, self.config.freq_dim))))
        time_BR6D = self.time_proj(F.silu(time_BRD)).unflatten(-1, (6, -1))
        text_BSD = self.text_2(gelu_tanh(self.text_1(text_BSD.to(dtype))))
        rope = rope_tables(frames, rows, columns, self.config.attention_head_dim, x_BLD.device)
        left_BLD, left_gate_BRD = None, None
        for index, (block, tables_BR6D) in enumerate(
            zip(self.blocks, self.modulation_tables(time_BR6D), strict=True)
        ):
            inputs = (
                x_BLD,
                left_BLD,
                left_gate_BRD,
                text_BSD,
                tables_BR6D,
                boundary_B,
                rope,
                attention,
            )
            x_BLD, left_BLD = (
                block(*inputs) if run_block is None else run_block(index, block, *inputs)
            )
            left_gate_BRD = tables_BR6D[:, :, 5]
        shift_BRD, scale_BRD = (self.scale_shift_table + time_BRD.unsqueeze(2)).unbind(2)
        left_gate = None if left_gate_BRD is None else Rows(left_gate_BRD, boundary_B)
        _, h_BLD = residual_norm(
            x_BLD,
            left_BLD,
            left_gate,
            Rows(shift_BRD, boundary_B),
            Rows(1 + scale_BRD, boundary_B),
            self.config.eps,
            dtype,
        )
        return unpatchify(
            self.proj_out(h_BLD).float(), (frames, rows, columns), self.config.patch_size
        )

    def modulation_tables(self, time_BR6D: Tensor) -> Sequence[Tensor]:
        """Per block float32 [B, R, 6, D]: shift, scale and gate of self-attention, then of the
        feed-forward.
        """
        if not self.blocks:
            return ()
        tables_N6D = torch.stack(
            [block.get_parameter("scale_shift_table") for block in self.blocks]
        )
        tables_NBR6D = tables_N6D[:, None, None] + time_BR6D
        tables_NBR6D[:, :, :, 1::3] += 1  # the scales
        return tables_NBR6D.unbind(0)


def attend(
    q_BLD: Tensor,
    k_BSD: Tensor,
    v_BSD: Tensor,
    num_heads: int,
    attention: Attention,
    num_spare: int = 0,
) -> Tensor:
    """Multi-head attention without a mask. q, k, v: [B, L|S, D] -> [B, L, D], `num_spare` columns
    behind its rows free where the kernel can do so.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BLD, k_BSD, v_BSD))
    return attention(q, k, v, num_spare).transpose(1, 2).flatten(2)


def latent_grid(shape: torch.Size, patch_size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tokens along time, height and width for a latent of [B, C, T, h, w]."""
    return shape[2] // patch_size[0], shape[3] // patch_size[1], shape[4] // patch_size[2]


def patchify(x_BCThw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, h, w] -> [B, L, C*pt*ph*pw]: the patch embedding is a convolution with stride =
    kernel, so a GEMM.
    """
    pt, ph, pw = patch_size
    # B C T pt h ph w pw
    x = x_BCThw.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def unpatchify(
    x_BLP: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> Tensor:
    """[B, L, pt*ph*pw*C] -> [B, C, T, h, w]; here the channel is the fastest index, unlike in
    `patchify`.
    """
    x = x_BLP.unflatten(1, grid).unflatten(4, (*patch_size, -1))  # B T h w pt ph pw C
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (any shape, float32): [..., dim], cosines first, as diffusers' Timesteps
    with flip_sin_to_cos.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angles = t.unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


_rope_cache: dict[tuple[int, int, int, int, torch.device], tuple[Tensor, Tensor]] = {}


def rope_tables(
    frames: int, rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [L, head_dim/2] each, of the three-axis rotary embedding with
    theta 10000.

    The head's pairs are divided among time, height and width; angles are computed in float64.
    Cached: a run sees few shapes, and the tables then keep their addresses for CUDA graphs.
    """
    key = (frames, rows, columns, head_dim, device)
    if key not in _rope_cache:
        side = 2 * (head_dim // 6)
        angles = []
        for axis, (size, dim) in enumerate(
            [(frames, head_dim - 2 * side), (rows, side), (columns, side)]
        ):
            inverse = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            view = [1, 1, 1, -1]
            view[axis] = size
            axis_angles = torch.outer(torch.arange(size, dtype=torch.float64), inverse).view(view)
            angles.append(axis_angles.expand(frames, rows, columns, dim // 2))
        angles_LE = torch.cat(angles, dim=-1).flatten(0, 2)
        _rope_cache[key] = (angles_LE.cos().float().to(device), angles_LE.sin().float().to(device))
    return _rope_cache[key]
