"""Sequence parallelism: the ranks of a group train one sample together, each on an equal share of
its tokens (Ulysses, arXiv 2309.14509).

Everything in a block works on single tokens, but for self-attention, which is independent for each
head. So before it the ranks exchange tokens for heads, and afterwards heads for tokens:

    q, k, v [B, L/P, H, E]  ->  [B, L, H/P, E]   attention of all tokens   ->  [B, L/P, H, E]

Of q, k, v and the output each rank sends (P - 1)/P, forward and again backward. Any attention
kernel will do, and nothing is gathered: the loss is made of tokens too, and what the ranks have of
the gradient is summed with that of all others. Both exchanges are operations of torch's own, so the
activation plan can save what they put out (train/activations/); where it does not, they are
repeated with the rest of a block.

Left out: padding. What P does not divide is refused (`check_sequence`, `check_heads`).

Shapes: B samples, L tokens, H heads, E width of a head, P ranks of a group.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel import mesh
from train.parallel.mesh import World

# an operation takes no group, only its name
_groups: dict[str, dist.ProcessGroup] = {}


@torch.library.custom_op("newsreel::tokens_to_heads", mutates_args=())
def tokens_to_heads(x_BLHE: Tensor, group: str) -> Tensor:
    """[B, L/P, H, E] -> [B, L, H/P, E]: this rank's heads of everyone's tokens."""
    num_ranks = _groups[group].size()
    send_PBLHE = _as_words(x_BLHE).unflatten(2, (num_ranks, -1)).movedim(2, 0).contiguous()
    received_PBLHE = all_to_all(send_PBLHE, group)
    return received_PBLHE.transpose(0, 1).flatten(1, 2).contiguous().view(x_BLHE.dtype)


@torch.library.custom_op("newsreel::heads_to_tokens", mutates_args=())
def heads_to_tokens(x_BLHE: Tensor, group: str) -> Tensor:
    """[B, L, H/P, E] -> [B, L/P, H, E]: all heads of this rank's tokens."""
    num_ranks = _groups[group].size()
    send_PBLHE = _as_words(x_BLHE).unflatten(1, (num_ranks, -1)).transpose(0, 1).contiguous()
    received_PBLHE = all_to_all(send_PBLHE, group)
    return received_PBLHE.movedim(0, 2).flatten(2, 3).contiguous().view(x_BLHE.dtype)


def _as_words(x: Tensor) -> Tensor:
    """The same bytes as int64 where they can be read so. A copy that rearranges moves element by
    element: 2 bytes at a time it reaches 1.6 TB/s on an H200, less than half of what a plain copy
    does.
    """
    per_word = 8 // x.element_size()
    *strides, last = x.stride()
    places = (x.shape[-1], x.storage_offset(), *strides)
    fits = last == 1 and not any(place % per_word for place in places)
    return x.view(torch.int64) if fits else x


def all_to_all(send_P: Tensor, group: str) -> Tensor:
    """Part p goes to rank p of the group; returns what came, by rank. Raises PeerLostError."""
    received_P = torch.empty_like(send_P)
    with mesh.peers():
        dist.all_to_all_single(received_P, send_P, group=_groups[group])
    return received_P


# each is the other's gradient


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _tokens_to_heads_backward(ctx: Any, grad_BLHE: Tensor) -> tuple[Tensor, None]:
    return heads_to_tokens(grad_BLHE, ctx.group), None


def _heads_to_tokens_backward(ctx: Any, grad_BLHE: Tensor) -> tuple[Tensor, None]:
    return tokens_to_heads(grad_BLHE, ctx.group), None


tokens_to_heads.register_autograd(_tokens_to_heads_backward, setup_context=_keep_group)
heads_to_tokens.register_autograd(_heads_to_tokens_backward, setup_context=_keep_group)
# by the names that the activation plan has for them
EXCHANGES = {
    torch.ops.newsreel.tokens_to_heads.default: "attn1.to_heads",
    torch.ops.newsreel.heads_to_tokens.default: "attn1.to_tokens",
}


def sequence_attention(attention: Callable[..., Tensor], world: World) -> Callable[..., Tensor]:
    """Self-attention of the tokens of all ranks of this rank's group, by the kernel `attention`: q,
    k, v [B, H, L/P, E] -> [B, H, L/P, E].
    """
    group = world.sequence_group
    assert group is not None
    name = group.group_name
    _groups[name] = group

    def exchanged(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, num_padding: int = 0) -> Tensor:
        # the projection that comes next copies what has no padding in a pass that it makes anyway
        q_BHLE, k_BHLE, v_BHLE = (
            tokens_to_heads(x_BHLE.transpose(1, 2), name).transpose(1, 2)
            for x_BHLE in (q_BHLE, k_BHLE, v_BHLE)
        )
        mixed_BHLE = attention(q_BHLE, k_BHLE, v_BHLE)
        return heads_to_tokens(mixed_BHLE.transpose(1, 2), name).transpose(1, 2)

    return exchanged


def check_sequence(num_ranks: int, num_tokens: Mapping[str, int]) -> None:
    """`num_tokens`: of each shape, by its name. Raises ValueError where `num_ranks` does not divide
    one of them.
    """
    odd = {name: number for name, number in num_tokens.items() if number % num_ranks}
    if odd:
        listed = ", ".join(f"{name} has {number:,}" for name, number in odd.items())
        raise ValueError(
            f"parallel.sequence = {num_ranks}: does not divide the tokens of every shape ({listed})"
            f"; use {_divisors(num_ranks, num_tokens.values())}, or train these shapes in a run of "
            f"their own"
        )


def check_heads(num_ranks: int, num_heads: int) -> None:
    """Raises ValueError where `num_ranks` does not divide them."""
    if num_heads % num_ranks:
        raise ValueError(
            f"parallel.sequence = {num_ranks}: does not divide the model's {num_heads} heads; use "
            f"{_divisors(num_ranks, [num_heads])}"
        )


def _divisors(below: int, numbers: Collection[int]) -> str:
    """Of all `numbers`, for people."""
    return " or ".join(str(n) for n in range(1, below) if not any(number % n for number in numbers))
