"""The encoder of loader/vae/blocks.py with one pass over memory between two convolutions: what runs
on a GPU.

The modules and weights are those of blocks.py; only the order of the work differs. A convolution
runs without its bias, on an input that lies ready in one buffer: the frames it remembers, then the
chunk. Its output is a `Pending` sum, which the pass to the next convolution finishes (`finish` in
loader/vae/pointwise.py): bias, residual, shortcut, norm, SiLU, and the copy into the next buffer.
So nothing is concatenated, and only what stands between two convolutions twice is stored twice.

Shapes: B batch, T frames, H height, W width, C channels, L = H * W, N = B * T. Tensors are dense
with channels last; torch calls that layout channels_last_3d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loader.vae.blocks import (
    Attention,
    CausalConv,
    DownBlock,
    Downsample,
    Encoder,
    Norm,
    Past,
    ResidualBlock,
)
from loader.vae.pending import GroupMean, Pending, Stream
from loader.vae.pointwise import add_biases, finish

# fp16 tensor cores take channels in multiples of 8; conv_in's 12 become 16
CHANNEL_MULTIPLE = 8


def encode_chunk(
    encoder: Encoder, pixels_BCTHW: Tensor, patch_size: int, past: Past, is_last: bool
) -> Tensor:
    """What `Encoder.forward` returns for these pixels (in patches): [B, 2 z, T, H, W].

    Any strides; the dtype is the weights'. `past` is empty before the first frame, which comes
    alone; `is_last` promises that no chunk follows, so that nothing is stored in it.
    """
    chunk = _Chunk(past, is_last)
    pending = chunk.conv_in(encoder.conv_in, pixels_BCTHW, patch_size)
    middle = encoder.mid_block
    for block in (*encoder.down_blocks, middle.resnets[0], middle.attentions[0], middle.resnets[1]):
        pending = chunk.run(block, pending)
    pending, _ = chunk.normed_conv(encoder.norm_out, encoder.conv_out, pending, keep_sum=False)
    assert pending.bias_C is not None
    return (pending.x_BTHWC + pending.bias_C).movedim(-1, 1)


class _Chunk:
    """One chunk of frames on its way through the encoder."""

    def __init__(self, past: Past, is_last: bool):
        self._past, self._is_first, self._is_last = past, not past, is_last

    def run(self, block: nn.Module, pending: Pending) -> Pending:
        if isinstance(block, DownBlock):
            return self.down_block(block, pending)
        if isinstance(block, ResidualBlock):
            return self.residual_block(block, pending)[0]
        if isinstance(block, Downsample):
            return self.downsample(block, pending)
        assert isinstance(block, Attention)
        return attention(block, pending)

    def conv_in(self, conv: CausalConv, pixels_BCTHW: Tensor, patch_size: int) -> Pending:
        """Cut pixels into patches, and convolve; missing channels are zeros."""
        channels = conv.in_channels
        x_BCTHhWw = pixels_BCTHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
        # within a channel the patch's column varies slowest
        x_BTHWCwh = x_BCTHhWw.permute(0, 2, 3, 5, 1, 6, 4)
        frames, padded = x_BTHWCwh.shape[1], -channels % CHANNEL_MULTIPLE + channels
        shape = (*x_BTHWCwh.shape[:4], padded)
        buffer_BTHWC = self._buffer(conv, conv.weight, shape).zero_()
        num_past = buffer_BTHWC.shape[1] - frames
        target_BTHWC = buffer_BTHWC[:, num_past:, ..., :channels]
        target_BTHWC.unflatten(-1, x_BTHWCwh.shape[4:]).copy_(x_BTHWCwh)
        if num_past:
            past_BPHWC = self._past[conv]
            buffer_BTHWC[:, num_past - past_BPHWC.shape[1] : num_past] = past_BPHWC
        self._remember(conv, buffer_BTHWC)
        return convolve(conv, buffer_BTHWC)

    def normed_conv(
        self, norm: Norm | None, conv: nn.Conv3d, pending: Pending, keep_sum: bool = True
    ) -> tuple[Pending, Stream | None]:
        """Norm, SiLU and convolution of a sum; with `keep_sum` the sum itself too."""
        x_BTHWC = pending.x_BTHWC
        buffer_BTHWC = self._buffer(conv, x_BTHWC, x_BTHWC.shape)
        del x_BTHWC
        gamma_C = None if norm is None else norm.gamma.flatten()
        stream = finish(
            pending, buffer_BTHWC, gamma_C, past_BPHWC=self._past.get(conv), keep_sum=keep_sum
        )
        self._remember(conv, buffer_BTHWC)
        return convolve(conv, buffer_BTHWC), stream

    def residual_block(self, block: ResidualBlock, pending: Pending) -> tuple[Pending, Stream]:
        """The block's output, and its input."""
        hidden, stream = self.normed_conv(block.norm1, block.conv1, pending)
        assert stream is not None
        out, _ = self.normed_conv(block.norm2, block.conv2, hidden, keep_sum=False)
        residual = stream
        if isinstance(block.conv_shortcut, CausalConv):
            residual = _linear(stream, block.conv_shortcut)
        out.residual_BTHWC = residual.x_BTHWC
        out.bias_C = add_biases(out.bias_C, residual.bias_C)
        return out, stream

    def down_block(self, block: DownBlock, pending: Pending) -> Pending:
        source: Stream | None = None
        for resnet in block.resnets:
            assert isinstance(resnet, ResidualBlock)
            pending, stream = self.residual_block(resnet, pending)
            source = source or stream
        if block.downsampler is not None:
            pending = self.downsample(block.downsampler, pending)
        assert source is not None
        pending.shortcut = GroupMean(source, block.time_factor, block.space_factor)
        return pending

    def downsample(self, block: Downsample, pending: Pending) -> Pending:
        batch, frames, height, width, channels = pending.x_BTHWC.shape
        padded_BTHWC = pending.x_BTHWC.new_empty(batch, frames, height + 1, width + 1, channels)
        finish(pending, padded_BTHWC, keep_sum=False)
        conv = block.resample[1]
        assert isinstance(conv, nn.Conv2d)
        y_NCHW = F.conv2d(padded_BTHWC.flatten(0, 1).movedim(-1, 1), conv.weight, None, stride=2)
        y_BTHWC = _dense(y_NCHW).unflatten(0, (batch, frames))
        down = Pending(y_BTHWC, conv.bias)
        if block.time_conv is None:
            return down
        if not self._is_first:
            return self.normed_conv(None, block.time_conv, down, keep_sum=False)[0]
        # the first frame stands for itself; the convolution over time begins with the next ones
        if not self._is_last:
            finish(Pending(y_BTHWC, conv.bias), first_BTHWC := y_BTHWC.new_empty(y_BTHWC.shape))
            self._remember(block.time_conv, first_BTHWC)
        return down

    def _buffer(self, conv: nn.Conv3d, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An empty input of `conv` for a chunk of this shape, with room for the past before it."""
        batch, frames, height, width, channels = shape
        return like.new_empty(batch, frames + self._num_past(conv), height, width, channels)

    def _num_past(self, conv: nn.Conv3d) -> int:
        return 0 if self._is_first else conv.kernel_size[0] - conv.stride[0]

    def _remember(self, conv: nn.Conv3d, buffer_BTHWC: Tensor) -> None:
        """Store the frames that the next chunk's input starts with."""
        if not self._is_last:
            num_past = conv.kernel_size[0] - conv.stride[0]
            is_whole = buffer_BTHWC.shape[1] <= num_past
            self._past[conv] = buffer_BTHWC if is_whole else buffer_BTHWC[:, -num_past:].clone()


def convolve(conv: nn.Conv3d, input_BTHWC: Tensor) -> Pending:
    """`conv` without its bias; of a single frame, with the last temporal tap alone."""
    padding = conv.padding[1:]
    weight_OCTHW = conv.weight
    num_missing = input_BTHWC.shape[-1] - weight_OCTHW.shape[1]
    if num_missing:
        weight_OCTHW = F.pad(weight_OCTHW, (0, 0, 0, 0, 0, 0, 0, num_missing))
        weight_OCTHW = weight_OCTHW.contiguous(memory_format=torch.channels_last_3d)
    if input_BTHWC.shape[1] == 1:
        weight_OCHW = weight_OCTHW[:, :, -1].contiguous(memory_format=torch.channels_last)
        x_BCHW = input_BTHWC[:, 0].movedim(-1, 1)
        y_BCHW = F.conv2d(x_BCHW, weight_OCHW, None, padding=padding)
        return Pending(_dense(y_BCHW).unsqueeze(1), conv.bias)
    y_BCTHW = F.conv3d(
        input_BTHWC.movedim(-1, 1), weight_OCTHW, None, stride=conv.stride, padding=(0, *padding)
    )
    return Pending(_dense(y_BCTHW), conv.bias)


def _dense(y_BCTHW: Tensor) -> Tensor:
    """Channels last. What cuDNN returns already is; a convolution on the CPU may not be."""
    return y_BCTHW.movedim(1, -1).contiguous()


def attention(module: Attention, pending: Pending) -> Pending:
    """`Attention.forward`, a frame at a time: its scores then stay in the cache."""
    batch, frames, height, width, dim = pending.x_BTHWC.shape
    normed_BTHWC = pending.x_BTHWC.new_empty(pending.x_BTHWC.shape)
    stream = finish(pending, normed_BTHWC, module.norm.gamma.flatten(), silu=False)
    assert stream is not None
    qkv_NLC = F.linear(
        normed_BTHWC.view(batch * frames, height * width, dim),
        module.to_qkv.weight.flatten(1),
        module.to_qkv.bias,
    )
    out_NLC = normed_BTHWC.new_empty(batch * frames, height * width, dim)
    for qkv_LC, out_LC in zip(qkv_NLC, out_NLC, strict=True):
        q_LC, k_LC, v_LC = qkv_LC.chunk(3, -1)
        weights_LL = _scores(q_LC * dim**-0.5, k_LC).softmax(-1)
        torch.mm(weights_LL.to(v_LC.dtype), v_LC, out=out_LC)
    out_BTHWC = F.linear(out_NLC.view_as(normed_BTHWC), module.proj.weight.flatten(1))
    bias_C = add_biases(module.proj.bias, stream.bias_C)
    return Pending(out_BTHWC, bias_C, stream.x_BTHWC)


def _scores(q_LC: Tensor, k_LC: Tensor) -> Tensor:
    """q k^T in float32, also where q and k are not."""
    if q_LC.is_cuda and q_LC.dtype != torch.float32:
        return torch.mm(q_LC, k_LC.mT, out_dtype=torch.float32)
    return q_LC.float() @ k_LC.float().mT


def _linear(stream: Stream, conv: nn.Conv3d) -> Stream:
    """A 1x1x1 convolution of a stream, whose bias stays pending."""
    weight_OC = conv.weight.flatten(1)
    bias_O = conv.bias
    if stream.bias_C is not None:
        bias_O = add_biases(bias_O, F.linear(stream.bias_C.float(), weight_OC.float()))
    return Stream(F.linear(stream.x_BTHWC, weight_OC), bias_O)
