"""LoRA as PEFT defines it: attach to train.model.wan.Wan, save and load in the keys of diffusers
and of ComfyUI.

A is initialised kaiming-uniform(a=sqrt 5), B zero, the update is scale * B A with scale = alpha /
rank. Targets are named as in diffusers' transformer block: attn1.to_q, attn1.to_out.0,
attn2.to_k, ffn.net.0.proj, ffn.net.2, ...

The two file formats treat alpha differently, and getting it wrong halves or doubles the effect
without an error: diffusers takes it from the metadata entry `lora_adapter_metadata` only (and
assumes alpha = rank without it), ComfyUI from one `.alpha` tensor per layer (and diffusers'
converter would count both).
"""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loader.files import write_atomic
from train.kernels.lowrank import dropout_keys
from train.kernels.pointwise import row_stride
from train.lora.linear import LoRALinear
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
_COMFYUI = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
METADATA_KEY = "lora_adapter_metadata"
DIFFUSERS_FILE, COMFYUI_FILE = "lora.safetensors", "lora_comfyui.safetensors"


class LoRAError(ValueError):
    """Targets or a LoRA file that don't fit the model; the message names the value and the way
    out.
    """


class LoRAProjections(nn.Module):
    """`Projections` with adapters on some of its layers; see train/lora/linear.py for the
    arithmetic.

    a_RK and b_NR are the float32 parameters (b_NR stacked over the adapted layers, [sum of N,
    rank]); `weight` holds [W | B] in the compute dtype and `a` = scale * A: `refresh` renews both
    after every change of the parameters.
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
    ):
        super().__init__()
        self.names, self.sizes = base.names, base.sizes
        self.adapted = tuple(name for name in base.names if name in targets)
        ends = torch.tensor(base.sizes).cumsum(0).tolist()
        rows = {
            name: (end - size, end)
            for name, size, end in zip(base.names, base.sizes, ends, strict=True)
        }
        self.blocks = tuple(rows[name] for name in self.adapted)
        self.rank, self.scale, self.dropout, self.layer = rank, alpha / rank, dropout, layer
        (num_out, width), device, dtype = base.weight.shape, base.weight.device, base.weight.dtype
        self.width, self.num_spare = width, rank * len(self.adapted)
        if nf4:
            self.nf4: NF4Weight | None = NF4Weight(base.weight, self.num_spare)
        else:
            self.nf4, stride = None, row_stride(width, self.num_spare)
            weight_NKR = torch.zeros(num_out, stride, dtype=dtype, device=device)[
                :, : width + self.num_spare
            ]
            weight_NKR[:, :width] = base.weight
            self.weight = nn.Parameter(weight_NKR, requires_grad=False)
        self.bias = base.bias
        self.register_buffer(
            "a", torch.zeros(self.num_spare, width, dtype=dtype, device=device), persistent=False
        )
        self.a_RK = nn.Parameter(
            torch.empty(self.num_spare, width, dtype=torch.float32, device=device)
        )
        num_adapted_out = sum(end - start for start, end in self.blocks)
        self.b_NR = nn.Parameter(
            torch.zeros(num_adapted_out, rank, dtype=torch.float32, device=device)
        )
        self.key_B: Tensor | None = None  # of dropout, for the samples of this pass

    def forward(self, x_BLK: Tensor, gelu: bool = False) -> Tensor:
        y: Tensor = LoRALinear.apply(
            x_BLK,
            self.nf4 or self.weight,
            self.bias,
            self.a,
            self.a_RK,
            self.b_NR,
            self.blocks,
            self.scale,
            self.dropout if self.training else 0.0,
            self.key_B,
            gelu,
        )
        return y

    def parts(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        """(target name, A [rank, K], B [N, rank]) of each adapted layer, views of the
        parameters.
        """
        row = 0
        for i, (name, (start, end)) in enumerate(zip(self.adapted, self.blocks, strict=True)):
            yield (
                name,
                self.a_RK.detach()[i * self.rank : (i + 1) * self.rank],
                self.b_NR.detach()[row : row + end - start],
            )
            row += end - start

    def copies(self) -> Iterable[tuple[Tensor, Tensor, float]]:
        """(destination, source, factor) of what brings the copies in the compute dtype up to
        date.
        """
        yield self.a, self.a_RK.detach(), self.scale
        for i, ((_, _, b), (start, end)) in enumerate(zip(self.parts(), self.blocks, strict=True)):
            b_NR = self.weight[:, self.width :] if self.nf4 is None else self.nf4.b_NR
            yield b_NR[start:end, i * self.rank : (i + 1) * self.rank], b, 1.0


class LoRA:
    """All adapters of a model: their parameters, the refresh after a step, the seeds of dropout."""

    def __init__(
        self,
        modules: dict[int, list[LoRAProjections]],
        rank: int,
        alpha: float,
        targets: tuple[str, ...],
    ):
        self.modules, self.rank, self.alpha, self.targets = modules, rank, alpha, targets
        self._all = [module for block in modules.values() for module in block]
        self._table: tuple[tuple[int, ...], Tensor, int] | None = None
        self.refresh()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self._all for parameter in (module.a_RK, module.b_NR)]

    def refresh(self) -> None:
        """Call after every change of the parameters: GEMMs read copies in the compute dtype."""
        if self._all[0].a.is_cuda:
            self.refresh_in_one_kernel()
            return
        with torch.no_grad():
            for destination, source, scale in (
                copy for module in self._all for copy in module.copies()
            ):
                destination.copy_(source * scale)

    def refresh_in_one_kernel(self) -> None:
        """The same, where one launch for each of hundreds of copies would cost milliseconds."""
        from train.kernels.pointwise_triton import copy_table, refresh

        places = tuple(
            tensor.data_ptr()
            for module in self._all
            for tensor in (
                module.a,
                module.a_RK,
                module.b_NR,
                module.weight if module.nf4 is None else module.nf4.b_NR,
            )
        )
        if self._table is None or self._table[0] != places:  # optim.flatten moves all parameters
            copies = [copy for module in self._all for copy in module.copies()]
            self._table = places, copy_table(copies), max(source.numel() for _, source, _ in copies)
        refresh(self._table[1], self._table[2], self._all[0].a.dtype)

    def set_seeds(self, seeds_B: Tensor) -> None:
        """Seeds (int64 [B]) of the samples of the next forward pass, for dropout."""
        if any(module.dropout for module in self._all):
            keys_NB = dropout_keys(seeds_B, 1 + max(module.layer for module in self._all))
            for module in self._all:
                module.key_B = keys_NB[module.layer]

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """ "blocks.N.TARGET" -> (A [rank, in], B [out, rank]), float32 views."""
        return {
            f"blocks.{index}.{name}": (a, b)
            for index, block in self.modules.items()
            for module in block
            for name, a, b in module.parts()
        }


def attach(
    model: Wan,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    nf4: bool = False,
) -> LoRA:
    """Put adapters on `targets` in every block of `model`, in place; only they will require a
    gradient.

    A is drawn from `seed` on the CPU, layer after layer, so that it is the same on every device.
    With `nf4` the frozen weights of these layers are quantised. Raises LoRAError.
    """
    chosen = tuple(targets)
    unknown = sorted(set(chosen) - set(TARGETS))
    if unknown or not chosen:
        raise LoRAError(
            f"lora.targets: {unknown or 'nothing'} given; choose from {', '.join(TARGETS)}"
        )
    if rank < 1 or (rank % 8 and next(model.parameters()).is_cuda):
        raise LoRAError(f"lora.rank = {rank}: use a multiple of 8, which tensor cores need")
    if not 0.0 <= dropout < 1.0:
        raise LoRAError(f"lora.dropout = {dropout}: must lie in [0, 1)")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    modules: dict[int, list[LoRAProjections]] = {}
    layer = -1
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        modules[index] = []
        for parent in (block.attn1, block.attn2, block.ffn):
            for child_name, child in list(parent.named_children()):
                layer += 1
                if isinstance(child, Projections) and not set(child.names).isdisjoint(chosen):
                    adapted = LoRAProjections(child, chosen, rank, alpha, dropout, layer, nf4)
                    for _, a, _ in adapted.parts():
                        # what kaiming_uniform_(a=sqrt(5)) comes to
                        bound = 1.0 / math.sqrt(adapted.width)
                        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
                    setattr(parent, child_name, adapted)
                    modules[index].append(adapted)
    return LoRA(modules, rank, alpha, chosen)


def save_both(lora: LoRA, folder: Path) -> None:
    """Write DIFFUSERS_FILE and COMFYUI_FILE into `folder`."""
    save_diffusers(lora, folder / DIFFUSERS_FILE)
    save_comfyui(lora, folder / COMFYUI_FILE)


def save_diffusers(lora: LoRA, path: Path) -> None:
    """Write the file that `pipe.load_lora_weights` takes: float32, alpha in the metadata, by
    rename.
    """
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        tensors[f"transformer.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = b.cpu().contiguous()
    metadata = {
        "transformer.r": lora.rank,
        "transformer.lora_alpha": lora.alpha,
        "transformer.target_modules": sorted(lora.targets),
    }
    _save(tensors, path, {METADATA_KEY: msgspec.json.encode(metadata, order="sorted").decode()})


def save_comfyui(lora: LoRA, path: Path) -> None:
    """Write the file that ComfyUI's LoRA loader takes: float32, one alpha per layer, no adapter
    metadata.
    """
    tensors = {}
    for name, (a, b) in lora.tensors().items():
        _, index, target = name.split(".", 2)
        prefix = f"diffusion_model.blocks.{index}.{_COMFYUI[target]}"
        tensors[f"{prefix}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = b.cpu().contiguous()
        tensors[f"{prefix}.alpha"] = torch.tensor(float(lora.alpha))
    _save(tensors, path, {})


def load_diffusers(lora: LoRA, path: Path) -> None:
    """Fill the adapters from a file of `save_diffusers`. Rank, alpha and targets must be the
    same. Raises LoRAError.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = msgspec.json.decode((file.metadata() or {}).get(METADATA_KEY, "{}"))
            found = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise LoRAError(
            f"{path}: can't be read as a LoRA file ({error}); give another one, or none"
        ) from error
    ours = {"transformer.r": lora.rank, "transformer.lora_alpha": lora.alpha}
    theirs = {key: metadata.get(key) for key in ours}
    if theirs != ours:
        raise LoRAError(
            f"{path}: the file has {theirs}, the configuration asks for {ours}; make them equal"
        )
    wanted = {f"transformer.{name}.lora_{kind}.weight" for name in lora.tensors() for kind in "AB"}
    if wanted != found.keys():
        raise LoRAError(
            f"{path}: adapters differ from lora.targets: {len(wanted - found.keys())} missing, "
            f"{len(found.keys() - wanted)} not asked for, {sorted(wanted ^ found.keys())[:2]}"
        )
    for name, (a, b) in lora.tensors().items():
        for kind, target in (("A", a), ("B", b)):
            source = found[f"transformer.{name}.lora_{kind}.weight"]
            if source.shape != target.shape:
                raise LoRAError(
                    f"{path}: {name}.lora_{kind} has shape {list(source.shape)}, not {list(target.shape)}"
                )
            target.copy_(source)
    lora.refresh()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    assert len(metadata) <= 1, (
        "safetensors writes several entries in any order, and equal runs must give equal bytes"
    )
    write_atomic(path, save(dict(sorted(tensors.items())), metadata))
