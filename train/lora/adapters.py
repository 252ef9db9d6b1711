"""LoRA as PEFT defines it, attached to train.model.wan.Wan.

A is initialised kaiming-uniform(a=sqrt 5), B zero, the update is scale * B A with scale = alpha /
rank. Targets are named as in diffusers' transformer block: attn1.to_q, attn1.to_out.0,
attn2.to_k, ffn.net.0.proj, ffn.net.2, ...

Shapes: B samples, L tokens, K in, N out, R = number of adapted layers that share an input * rank.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.kernels.dropout import Dropout, dropout_keys, keys_from
from train.kernels.layout import Span, has_columns, weight_with_columns, widen_weight
from train.kernels.refresh import Copy, CopyTable, copy_table, refresh, refresh_eager
from train.lora.linear import AdapterParameter, FusedLayers, LoRALinear
from train.lora.nf4 import NF4Weight
from train.model.wan import Block, Projections, Wan

TARGETS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
)


class LoRAError(ValueError):
    """Targets or a LoRA file that don't fit the model; the message names the value and what to
    do.
    """


class Factors(NamedTuple):
    """The float32 A [rank, K] and B [N, rank] of one layer, views of the parameters."""

    a: Tensor
    b: Tensor


class LoRAProjections(nn.Module):
    """`Projections` with adapters on some of its layers; see train/lora/linear.py for the
    arithmetic.

    a_RK and b_NR are the float32 parameters (b_NR stacked over the adapted layers, [sum of N,
    rank]); `weight` holds [W | B] in the compute dtype and `a` = scale * A: `LoRA.refresh` renews
    both after every change of the parameters.
    """

    a: Tensor

    def __init__(
        self,
        base: Projections,
        targets: tuple[str, ...],
        rank: int,
        alpha: float,
        dropout: float,
        layer: int,
        nf4: bool = False,
        tensor_cores: bool = True,
    ):
        super().__init__()
        self.tag, self.names, self.sizes = base.tag, base.names, base.sizes
        self.adapted = tuple(name for name in base.names if name in targets)
        self.spans = _spans(base, self.adapted)
        self.rank, self.scale, self.dropout, self.layer = rank, alpha / rank, dropout, layer
        self.tensor_cores = tensor_cores
        # for the samples of this pass
        self.key_B: Tensor | None = None

        self.width, self.num_padding = base.weight.shape[1], rank * len(self.adapted)
        self.nf4: NF4Weight | None = None
        # B's columns, where [W | B] is a slot that other blocks use too (train/placement/)
        self.kept_b_NR: Tensor | None = None
        weight = base.weight.detach()
        if has_columns(weight, self.num_padding):
            wide = weight_with_columns(weight, self.num_padding)
            self.weight = nn.Parameter(wide, requires_grad=False)
            self.kept_b_NR = weight.new_zeros(weight.shape[0], self.num_padding)
        elif nf4:
            self.nf4 = NF4Weight(base.weight, self.num_padding)
        else:
            wide = widen_weight(weight, self.num_padding)
            self.weight = nn.Parameter(wide, requires_grad=False)
        self.bias = base.bias
        self.register_buffer(
            "a",
            torch.zeros(
                self.num_padding, self.width, dtype=base.weight.dtype, device=base.weight.device
            ),
            persistent=False,
        )
        num_adapted_out = sum(span.end - span.first for span in self.spans)
        self.a_RK = AdapterParameter(
            torch.empty(
                self.num_padding, self.width, dtype=torch.float32, device=base.weight.device
            )
        )
        self.b_NR = AdapterParameter(
            torch.zeros(num_adapted_out, rank, dtype=torch.float32, device=base.weight.device)
        )

    def forward(self, x_BLK: Tensor, gelu: bool = False) -> Tensor:
        """[B, L, K] -> [B, L, sum of N]; with `gelu` x goes through GELU first."""
        y: Tensor = LoRALinear.apply(
            x_BLK,
            self.nf4 or self.weight,
            self.bias,
            self.a,
            self.a_RK,
            self.b_NR,
            Dropout(self.dropout if self.training else 0.0, self.key_B),
            FusedLayers(self.tag, self.spans, self.scale, gelu, self.tensor_cores),
        )
        return y

    def factors(self) -> Iterator[tuple[str, Factors]]:
        """(target name, its A and B) of each adapted layer."""
        row = 0
        for i, (name, span) in enumerate(zip(self.adapted, self.spans, strict=True)):
            num_out = span.end - span.first
            yield (
                name,
                Factors(
                    a=self.a_RK.detach()[i * self.rank : (i + 1) * self.rank],
                    b=self.b_NR.detach()[row : row + num_out],
                ),
            )
            row += num_out

    def b_columns(self) -> Tensor:
        """B's columns of the [W | B] buffer, [N, R], a view; or what they are written from."""
        if self.kept_b_NR is not None:
            return self.kept_b_NR
        return self.weight[:, self.width :] if self.nf4 is None else self.nf4.b_NR

    def write_columns(self) -> None:
        """Write B behind a W that has just come to its slot."""
        assert self.kept_b_NR is not None
        self.weight[:, self.width :].copy_(self.kept_b_NR)

    def copies(self) -> Iterator[Copy]:
        """What brings the copies in the compute dtype up to date."""
        yield Copy(self.a, self.a_RK.detach(), self.scale)
        for i, ((_, factors), span) in enumerate(zip(self.factors(), self.spans, strict=True)):
            columns = slice(i * self.rank, (i + 1) * self.rank)
            yield Copy(self.b_columns()[span.first : span.end, columns], factors.b, 1.0)


class LoRA:
    """All adapters of a model: their parameters, the refresh after a step, the seeds of dropout."""

    def __init__(
        self,
        modules: dict[int, list[LoRAProjections]],
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
        num_blocks: int,
    ):
        """`modules`: of each adapted block, by its index. num_blocks: of the model."""
        self.modules, self.rank, self.alpha, self.targets = modules, rank, alpha, targets
        self.num_blocks = num_blocks
        self._all = [module for block in modules.values() for module in block]
        self._table: CopyTable | None = None
        self._addresses: list[int] = []  # of the tensors that the table was made of
        self.refresh()

    @property
    def first_block(self) -> int:
        """The first block with adapters: nothing before it needs a gradient."""
        return min(self.modules)

    def parameters(self) -> list[AdapterParameter]:
        return [parameter for module in self._all for parameter in (module.a_RK, module.b_NR)]

    def parameters_apart(self) -> tuple[list[AdapterParameter], list[AdapterParameter]]:
        """All A, and all B."""
        return [module.a_RK for module in self._all], [module.b_NR for module in self._all]

    def copies(self) -> list[Copy]:
        return [copy for module in self._all for copy in module.copies()]

    def refresh(self) -> None:
        """Call after every change of the parameters: GEMMs read copies in the compute dtype."""
        if self._all[0].a.is_cuda:
            self.refresh_in_one_kernel()
        else:
            refresh_eager(self.copies())

    def refresh_in_one_kernel(self) -> None:
        """The same, by the Triton kernel."""
        addresses = [
            tensor.data_ptr()
            for module in self._all
            for tensor in (module.a, module.a_RK, module.b_NR, module.b_columns())
        ]
        # the parameters move, in optim.flatten
        if self._table is None or self._addresses != addresses:
            self._table, self._addresses = copy_table(self.copies()), addresses
        refresh(self._table)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The base model, as long as the block runs: the copies of B that GEMMs read are zero."""
        for module in self._all:
            module.b_columns().zero_()
        try:
            yield
        finally:
            self.refresh()

    def set_seeds(self, seeds_B: Tensor, first_token: int = 0) -> None:
        """Seeds (int64 [B]) of the samples of the next forward pass, for dropout. first_token: of
        the video tokens that pass through, where these are a part of a sample.
        """
        if any(module.dropout for module in self._all):
            keys_NB = dropout_keys(seeds_B, 1 + max(module.layer for module in self._all))
            for module in self._all:
                key_B = keys_NB[module.layer]
                # the text is there as a whole
                reads_text = module.tag == "attn2.kv"
                module.key_B = key_B if reads_text else keys_from(key_B, first_token)

    def tensors(self) -> dict[str, Factors]:
        """ "blocks.N.TARGET" -> its A [rank, in] and B [out, rank], float32 views."""
        return {
            f"blocks.{index}.{name}": factors
            for index, block in self.modules.items()
            for module in block
            for name, factors in module.factors()
        }


def check_targets(targets: Collection[str], rank: int, *, on_gpu: bool) -> None:
    """Can there be adapters of this rank on these layers? Raises LoRAError."""
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown or not targets:
        raise LoRAError(
            f"lora.targets: {unknown or 'nothing'} given; choose from {', '.join(TARGETS)}"
        )
    if rank < 1 or (on_gpu and rank % 8):
        raise LoRAError(f"lora.rank = {rank}: use a multiple of 8, which tensor cores need")


def attach(
    model: Wan,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    nf4: bool = False,
    tensor_cores: bool = True,
    blocks: Collection[int] | None = None,
) -> LoRA:
    """Put adapters on `targets` in `blocks` of `model` (None: in all), in place; only they will
    require a gradient.

    A is drawn from `seed` on the CPU, layer after layer, so that it is the same on every device.
    With `nf4` the frozen weights of these layers are quantised. With `tensor_cores` False the
    low-rank products run as on a card before sm_80, whatever this card is: see
    train/kernels/lowrank.py. Raises LoRAError.
    """
    chosen = tuple(targets)
    check_targets(chosen, rank, on_gpu=next(model.parameters()).is_cuda)
    if not 0.0 <= dropout < 1.0:
        raise LoRAError(f"lora.dropout = {dropout}: must lie in [0, 1)")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[int, list[LoRAProjections]] = {}
    # counts the layers that are not adapted too: dropout of one depends on no other
    layer = -1
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if blocks is None or index in blocks:
            modules[index] = []
        for parent in (block.attn1, block.attn2, block.ffn):
            for child_name, child in list(parent.named_children()):
                layer += 1
                if index not in modules:
                    continue
                if not isinstance(child, Projections) or set(child.names).isdisjoint(chosen):
                    continue
                adapted = LoRAProjections(
                    child, chosen, rank, alpha, dropout, layer, nf4, tensor_cores
                )
                _initialise(adapted, generator)
                setattr(parent, child_name, adapted)
                modules[index].append(adapted)
    return LoRA(modules, rank, alpha, chosen, num_blocks=len(model.blocks))


def _initialise(module: LoRAProjections, generator: torch.Generator) -> None:
    # what kaiming_uniform_(a=sqrt(5)) comes to
    bound = 1.0 / math.sqrt(module.width)
    for _, factors in module.factors():
        values = torch.empty(factors.a.shape).uniform_(-bound, bound, generator=generator)
        factors.a.copy_(values)


def _spans(base: Projections, adapted: tuple[str, ...]) -> tuple[Span, ...]:
    """The rows of W that belong to each adapted layer."""
    spans, first = {}, 0
    for name, size in zip(base.names, base.sizes, strict=True):
        spans[name] = Span(first, first + size)
        first += size
    return tuple(spans[name] for name in adapted)
