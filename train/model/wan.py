"""The Wan2.2 transformer (DiT), lean: what training with a frozen base needs. It knows nothing of
LoRA.

Three things differ from the diffusers model, and none of them changes the result:

- A sample has at most two distinct timesteps: t, and 0 for the tokens of a clean first frame. So
  the modulation is two rows per sample and a boundary index, not a row per token (0.8 GB in fp32
  at 1280x704x49).
- Linear layers that read the same input are one GEMM (`Projections`).
- The residual stream, norms and modulation stay in float32; only GEMM and attention inputs are in
  the compute dtype.

Left out: image cross-attention (Wan2.1 I2V), and dropout, which Wan does not use.

Shapes: B samples, L video tokens, S text tokens (512), D model width, H heads, C latent channels,
T/h/w latent frames, rows and columns, P = C * pt * ph * pw numbers of a patch, R = 2 modulation
rows (0: the clean first frame at t = 0; 1: the rest). Source of names and constants: diffusers'
transformer_wan.py, version 0.42.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.kernels.layout import Rows
from train.kernels.pointwise import gelu_tanh, residual_norm, split_norm_rope
from train.model.attention import Attention
from train.model.tag import tagged

_ROPE_THETA = 10000.0
_TIMESTEP_PERIOD = 10000.0


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


# both experts; I2V-A14B has 36 channels in, and Wan2.1-T2V-14B is the same model
T2V_A14B = msgspec.structs.replace(
    TI2V_5B,
    num_layers=40,
    num_attention_heads=40,
    in_channels=16,
    out_channels=16,
    ffn_dim=13824,
)
I2V_A14B = msgspec.structs.replace(T2V_A14B, in_channels=36)
WAN21_1_3B = msgspec.structs.replace(T2V_A14B, num_layers=30, num_attention_heads=12, ffn_dim=8960)


class Projections(nn.Module):
    """Linear layers that read the same input, as one GEMM: [..., in] -> [..., sum(out)].

    `layers`: the layers' names in the diffusers block, in the order of their rows, and their
    output widths. `tag` names the GEMM for the activation plan (train/model/tag.py).
    """

    # what an adapter needs behind each row of the input: see train/kernels/layout.py
    num_padding = 0

    def __init__(self, in_features: int, layers: dict[str, int], tag: str = ""):
        super().__init__()
        self.tag, self.names, self.sizes = tag, tuple(layers), tuple(layers.values())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes)))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """With `gelu` x goes through GELU first: an adapter does both in one pass."""
        if gelu:
            x = gelu_tanh(x)
        with tagged(self.tag):
            return F.linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.qkv = Projections(
            dim, {"attn1.to_q": dim, "attn1.to_k": dim, "attn1.to_v": dim}, tag="attn1.qkv"
        )
        self.out = Projections(dim, {"attn1.to_out.0": dim}, tag="attn1.out")
        self.norm_q, self.norm_k = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        q_BLD, k_BLD, v_BLD = split_norm_rope(
            self.qkv(x_BLD), (self.norm_q, self.norm_k), rope, self.num_heads, self.eps
        )
        with tagged("attn1"):
            mixed_BLD = attend(q_BLD, k_BLD, v_BLD, self.num_heads, attention, self.out.num_padding)
        out: Tensor = self.out(mixed_BLD)
        return out


class CrossAttention(nn.Module):
    """Not masked: diffusers pads the text with zero rows and lets every query see them."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.q = Projections(dim, {"attn2.to_q": dim}, tag="attn2.q")
        self.kv = Projections(dim, {"attn2.to_k": dim, "attn2.to_v": dim}, tag="attn2.kv")
        self.out = Projections(dim, {"attn2.to_out.0": dim}, tag="attn2.out")
        self.norm_q, self.norm_k = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, attention: Attention) -> Tensor:
        (q_BLD,) = split_norm_rope(self.q(x_BLD), (self.norm_q,), None, self.num_heads, self.eps)
        k_BSD, v_BSD = split_norm_rope(
            self.kv(text_BSD), (self.norm_k,), None, self.num_heads, self.eps
        )
        with tagged("attn2"):
            mixed_BLD = attend(q_BLD, k_BSD, v_BSD, self.num_heads, attention, self.out.num_padding)
        out: Tensor = self.out(mixed_BLD)
        return out


class FeedForward(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        self.up = Projections(config.dim, {"ffn.net.0.proj": config.ffn_dim}, tag="ffn.up")
        self.down = Projections(config.ffn_dim, {"ffn.net.2": config.dim}, tag="ffn.down")

    def forward(self, x_BLD: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x_BLD), gelu=True)
        return out


class BlockInputs(NamedTuple):
    """What every block of a forward pass takes, beside the stream and its pending residual."""

    text_BSD: Tensor
    boundary_B: Tensor  # int64: tokens before it use modulation row 0
    rope: tuple[Tensor, Tensor]  # `rope_tables`
    attention: Attention
    self_attention: Attention  # another one where the tokens are a part of a sample's


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward.

    What the feed-forward adds to the residual stream is left pending: the norm that comes next,
    in the following block or at the end of the model, reads the stream anyway and adds it in the
    same pass. So a block takes the stream and the pending residual of the block before, and
    returns the same two.
    """

    def __init__(self, config: WanConfig):
        super().__init__()
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.ffn = FeedForward(config)
        self.norm2_weight = nn.Parameter(torch.empty(config.dim))
        self.norm2_bias = nn.Parameter(torch.empty(config.dim))
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.dim))
        self.eps = config.eps

    def forward(
        self,
        x_BLD: Tensor,
        pending_BLD: Tensor | None,
        pending_gate_BRD: Tensor | None,
        tables_BR6D: Tensor,
        inputs: BlockInputs,
    ) -> tuple[Tensor, Tensor]:
        """x: float32. `pending_BLD` times `pending_gate_BRD` is to be added to it (None in the
        first block). Tables: see `modulation_tables`.
        """
        text_BSD, boundary_B, rope, attention, self_attention = inputs
        dtype = text_BSD.dtype
        shift1, scale1, gate1, shift3, scale3, _ = (
            Rows(rows_BRD, boundary_B) for rows_BRD in tables_BR6D.unbind(2)
        )
        # the same for all tokens: the norm before cross-attention is not modulated
        shift2, scale2 = Rows(self.norm2_bias, None), Rows(self.norm2_weight, None)
        x_BLD, h_BLD = residual_norm(
            x_BLD,
            y_BLD=pending_BLD,
            gate=None if pending_gate_BRD is None else Rows(pending_gate_BRD, boundary_B),
            shift=shift1,
            scale=scale1,
            eps=self.eps,
            dtype=dtype,
            num_padding=self.attn1.qkv.num_padding,
        )
        x_BLD, h_BLD = residual_norm(
            x_BLD,
            y_BLD=self.attn1(h_BLD, rope, self_attention),
            gate=gate1,
            shift=shift2,
            scale=scale2,
            eps=self.eps,
            dtype=dtype,
            num_padding=self.attn2.q.num_padding,
        )
        x_BLD, h_BLD = residual_norm(
            x_BLD,
            y_BLD=self.attn2(h_BLD, text_BSD, attention),
            gate=None,
            shift=shift3,
            scale=scale3,
            eps=self.eps,
            dtype=dtype,
            num_padding=self.ffn.up.num_padding,
        )
        return x_BLD, self.ffn(h_BLD)


class TokenShare(NamedTuple):
    """Which tokens of every sample pass through: part `number` of `num_parts` equal ones.
    `attention` is self-attention of these with the tokens of all parts.
    """

    number: int
    num_parts: int
    attention: Attention

    def first(self, num_tokens: int) -> int:
        """The first one of this part's tokens, of `num_tokens` altogether."""
        return self.number * (num_tokens // self.num_parts)


# run_block(index, block, x, pending, pending_gate, tables, inputs) -> (x, pending): how a block
# is run, see train/activations/runner.py. None: plainly
RunBlock = (
    Callable[
        [int, Block, Tensor, Tensor | None, Tensor | None, Tensor, BlockInputs],
        tuple[Tensor, Tensor],
    ]
    | None
)


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
        """Predict the velocity: float32 [B, out_channels, T, h, w].

        latent_BCThw: noised latent of `in_channels`, any float dtype. t_BR: float32 timesteps
        0..1000 of the two modulation rows. num_clean_frames_B: int64, latent frames at the start
        that use row 0 (I2V: 1, else 0). text_BSD: UMT5 rows, padded with zero rows to 512
        **before** this call. `run_block` decides what each block saves for the backward pass
        (train/activations/runner.py); None: everything.
        """
        velocity_BLP = self.token_velocity(
            latent_BCThw, t_BR, num_clean_frames_B, text_BSD, attention, run_block
        )
        patch_size = self.config.patch_size
        return unpatchify(velocity_BLP, latent_grid(latent_BCThw.shape, patch_size), patch_size)

    def token_velocity(
        self,
        latent_BCThw: Tensor,
        t_BR: Tensor,
        num_clean_frames_B: Tensor,
        text_BSD: Tensor,
        attention: Attention,
        run_block: RunBlock = None,
        share: TokenShare | None = None,
    ) -> Tensor:
        """The same for each token, or each of `share`: float32 [B, L, pt*ph*pw*C], as
        `velocity_tokens` cuts a velocity up.
        """
        config, dtype = self.config, self.patch_embedding.weight.dtype
        grid = latent_grid(latent_BCThw.shape, config.patch_size)
        patches_BLP = patchify(latent_BCThw, config.patch_size)
        share = TokenShare(0, 1, attention) if share is None else share
        first = share.first(grid.num_tokens)
        num_tokens = grid.num_tokens // share.num_parts
        tokens = slice(first, first + num_tokens)
        x_BLD = self.patch_embedding(patches_BLP[:, tokens].to(dtype)).float()

        # two modulation rows per sample: the time embedding stays in float32
        embedding = timestep_embedding(t_BR, config.freq_dim)
        time_BRD = self.time_2(F.silu(self.time_1(embedding)))
        time_BR6D = self.time_proj(F.silu(time_BRD)).unflatten(-1, (6, -1))

        # counted from the first token here
        boundary_B = num_clean_frames_B * (grid.rows * grid.columns) - first
        cosines_LE, sines_LE = rope_tables(*grid, config.attention_head_dim, x_BLD.device)
        inputs = BlockInputs(
            text_BSD=self.text_2(gelu_tanh(self.text_1(text_BSD.to(dtype)))),
            boundary_B=boundary_B.clamp(0, num_tokens),
            rope=(cosines_LE[tokens], sines_LE[tokens]),
            attention=attention,
            self_attention=share.attention,
        )
        pending_BLD, pending_gate_BRD = None, None
        tables_NBR6D = self.modulation_tables(time_BR6D)
        for index, (block, tables_BR6D) in enumerate(zip(self.blocks, tables_NBR6D, strict=True)):
            block_inputs = (x_BLD, pending_BLD, pending_gate_BRD, tables_BR6D, inputs)
            if run_block is None:
                x_BLD, pending_BLD = block(*block_inputs)
            else:
                assert isinstance(block, Block)
                x_BLD, pending_BLD = run_block(index, block, *block_inputs)
            # the feed-forward's
            pending_gate_BRD = tables_BR6D[:, :, 5]

        boundary_B = inputs.boundary_B
        shift_BRD, scale_BRD = (self.scale_shift_table + time_BRD.unsqueeze(2)).unbind(2)
        _, h_BLD = residual_norm(
            x_BLD,
            y_BLD=pending_BLD,
            gate=None if pending_gate_BRD is None else Rows(pending_gate_BRD, boundary_B),
            shift=Rows(shift_BRD, boundary_B),
            scale=Rows(1 + scale_BRD, boundary_B),
            eps=config.eps,
            dtype=dtype,
        )
        velocity_BLP: Tensor = self.proj_out(h_BLD).float()
        return velocity_BLP

    def modulation_tables(self, time_BR6D: Tensor) -> Sequence[Tensor]:
        """Per block float32 [B, R, 6, D]: shift, scale and gate of self-attention, then of the
        feed-forward. 1 is already added to the scales.
        """
        if not self.blocks:
            return ()
        # one addition for all blocks
        tables_N6D = torch.stack(
            [block.get_parameter("scale_shift_table") for block in self.blocks]
        )
        tables_NBR6D = tables_N6D[:, None, None] + time_BR6D
        tables_NBR6D[:, :, :, 1::3] += 1
        return tables_NBR6D.unbind(0)


def attend(
    q_BLD: Tensor,
    k_BSD: Tensor,
    v_BSD: Tensor,
    num_heads: int,
    attention: Attention,
    num_padding: int = 0,
) -> Tensor:
    """Multi-head attention without a mask. q, k, v: [B, L|S, D] -> [B, L, D], with `num_padding`
    elements behind its rows where the kernel can do so.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_BLD, k_BSD, v_BSD))
    return attention(q, k, v, num_padding).transpose(1, 2).flatten(2)


class Grid(NamedTuple):
    """Tokens along time, height and width."""

    frames: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.frames * self.rows * self.columns


def latent_grid(shape: torch.Size, patch_size: tuple[int, int, int]) -> Grid:
    """Of a latent of shape [B, C, T, h, w]."""
    return Grid(*(size // patch for size, patch in zip(shape[2:], patch_size, strict=True)))


def patchify(x_BCThw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, h, w] -> [B, L, C*pt*ph*pw]: the patch embedding is a convolution with stride =
    kernel, so a GEMM.
    """
    pt, ph, pw = patch_size
    # B C T pt h ph w pw
    x = x_BCThw.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    # B T h w C pt ph pw
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.flatten(4, 7).flatten(1, 3)


def unpatchify(x_BLP: Tensor, grid: Grid, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, L, pt*ph*pw*C] -> [B, C, T, h, w]; here the channel is the fastest index, unlike in
    `patchify`.
    """
    # B T h w pt ph pw C
    x = x_BLP.unflatten(1, grid).unflatten(4, (*patch_size, -1))
    # B C T pt h ph w pw
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def velocity_tokens(x_BCThw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, h, w] -> [B, L, pt*ph*pw*C]: what `unpatchify` puts together."""
    pt, ph, pw = patch_size
    # B C T pt h ph w pw
    x = x_BCThw.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    # B T h w pt ph pw C
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 7).flatten(1, 3)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (any shape, float32): [..., dim], cosines first, as diffusers' Timesteps
    with flip_sin_to_cos.
    """
    half = dim // 2
    step = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(_TIMESTEP_PERIOD) * step / half)
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
        # height and width get a third each, rounded down to pairs, time the rest
        side = 2 * (head_dim // 6)
        axes = [(frames, head_dim - 2 * side), (rows, side), (columns, side)]
        angles = []
        for axis, (size, dim) in enumerate(axes):
            pair = torch.arange(0, dim, 2, dtype=torch.float64)
            frequency = 1.0 / _ROPE_THETA ** (pair / dim)
            position = torch.arange(size, dtype=torch.float64)
            # this axis counts, the other two are repeated
            view = [1, 1, 1, -1]
            view[axis] = size
            axis_angles = torch.outer(position, frequency).view(view)
            angles.append(axis_angles.expand(frames, rows, columns, dim // 2))
        angles_LE = torch.cat(angles, dim=-1).flatten(0, 2)
        _rope_cache[key] = (angles_LE.cos().float().to(device), angles_LE.sin().float().to(device))
    return _rope_cache[key]
