"""Load the transformer of a diffusers folder (one safetensors file or many with an index) into
train.model.wan.Wan.

Tensors go one by one from the mapped file to their place on the device, so a 5B model needs no
second copy in memory. GEMM weights take the compute dtype; norms, modulation tables and the time
embedding stay in float32, because they work on the float32 residual stream and cost nothing.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loader.files import cause_of
from loader.models import KINDS
from train.model.wan import Projections, Wan, WanConfig

CONFIG = "config.json"
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_FLOAT32_MODULES = ("time_1", "time_2", "time_proj")
_NORMS = {
    "attn1.norm_q": "attn1.norm_q.weight",
    "attn1.norm_k": "attn1.norm_k.weight",
    "attn2.norm_q": "attn2.norm_q.weight",
    "attn2.norm_k": "attn2.norm_k.weight",
    "norm2_weight": "norm2.weight",
    "norm2_bias": "norm2.bias",
    "scale_shift_table": "scale_shift_table",
}


class WeightsError(ValueError):
    """A model folder that can't be loaded; the message names the file, the tensor and what to
    do.
    """


class Elsewhere(Protocol):
    """Parameters that are not kept on the device (train/placement/)."""

    def holds(self, name: str) -> bool:
        """Whether this one is such a parameter."""

    def target(self, name: str) -> Tensor | None:
        """Where it is to be filled; None: another process does that."""

    def parameter(self, name: str) -> Tensor:
        """What the model has in its place."""


def load_transformer(
    model_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    subfolder: str = "transformer",
    elsewhere: Elsewhere | None = None,
) -> Wan:
    """Build Wan from `model_dir`/`subfolder`, frozen, GEMM weights in `dtype` on `device`, or
    `elsewhere`. Raises WeightsError.
    """
    folder = model_dir / subfolder
    config = read_config(folder / CONFIG)
    check_weights(folder, config)
    files = tensor_files(folder)
    handles = {file: _open(folder / file) for file in set(files.values())}
    return build_transformer(
        config,
        files.keys(),
        lambda name: handles[files[name]].get_tensor(name),
        device,
        dtype,
        str(folder),
        elsewhere,
    )


def build_transformer(
    config: WanConfig,
    available: Collection[str],
    read: Callable[[str], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    where: str,
    elsewhere: Elsewhere | None = None,
) -> Wan:
    """Build Wan and fill it from the diffusers tensors that `read` gives by name; `where` is for
    messages.

    GEMM weights in `dtype`, the rest float32, on `device` or `elsewhere`, frozen. Raises
    WeightsError if `available` are not exactly the tensors of a Wan2.2 transformer, or don't have
    the shapes of `config`.
    """
    with torch.device("meta"):
        model = Wan(config)
    sources = tensor_sources(model)
    _check_names(sources, available, where)
    parameters = dict(model.named_parameters())
    for name, names in sources.items():
        meta = parameters[name]
        if elsewhere is not None and elsewhere.holds(name):
            weight, place = elsewhere.parameter(name), elsewhere.target(name)
            if place is None:
                _assign(model, name, weight)
                continue
            target = place
        else:
            weight = target = torch.empty(meta.shape, dtype=held_as(name, dtype), device=device)
        # layers that read the same input are stacked: one GEMM
        row = 0
        for source in names:
            # the patch convolution becomes a matrix; tables lose a leading 1
            tensor = read(source).reshape(-1, *meta.shape[1:])
            if row + tensor.shape[0] > target.shape[0]:
                raise WeightsError(
                    f"{where}: {source} has shape {list(tensor.shape)}, which does not fit {name} "
                    f"{list(meta.shape)} of config.json"
                )
            target[row : row + tensor.shape[0]].copy_(tensor)
            row += tensor.shape[0]
        if row != target.shape[0]:
            raise WeightsError(
                f"{where}: {names} fill {row} of the {target.shape[0]} rows of {name}"
            )
        _assign(model, name, weight)
    return model


def check_weights(folder: Path, config: WanConfig) -> None:
    """Are a transformer folder's tensors those of `config`, name by name and shape by shape? Only
    the headers of the files are read. Raises WeightsError.
    """
    files = tensor_files(folder)
    handles = {file: _open(folder / file) for file in set(files.values())}
    held = {file: set(handle.keys()) for file, handle in handles.items()}
    for name, file in files.items():
        if name not in held[file]:
            raise WeightsError(
                f"{folder / file}: has no tensor {name}, which {INDEX} says it has; download the "
                f"model again"
            )
    with torch.device("meta"):
        model = Wan(config)
    sources = tensor_sources(model)
    _check_names(sources, files, str(folder))
    parameters = dict(model.named_parameters())
    for name, names in sources.items():
        meta = parameters[name]
        row_size = math.prod(meta.shape[1:])
        shapes = [handles[files[source]].get_slice(source).get_shape() for source in names]
        # the patch convolution becomes a matrix; tables lose a leading 1
        if any(math.prod(shape) % row_size for shape in shapes) or (
            sum(math.prod(shape) for shape in shapes) != meta.numel()
        ):
            raise WeightsError(
                f"{folder}: {', '.join(names)} have shapes {shapes}, which do not fill {name} "
                f"{list(meta.shape)} of config.json; download the model again"
            )


def _check_names(sources: dict[str, list[str]], available: Collection[str], where: str) -> None:
    missing = sorted(name for names in sources.values() for name in names if name not in available)
    unused = sorted(set(available) - {name for names in sources.values() for name in names})
    if missing or unused:
        raise WeightsError(
            f"{where}: not the tensors of a Wan2.2 transformer: "
            f"{len(missing)} missing {missing[:3]}, {len(unused)} unknown {unused[:3]}"
        )


def read_config(path: Path) -> WanConfig:
    """Read transformer/config.json. Raises WeightsError for what newsreel does not train."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=WanConfig)
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(
            f"{path}: {cause_of(error)}; model.path must be a diffusers folder such as a download "
            f"of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        ) from error
    _refuse_what_is_not_trained(config, path)
    return config


def _refuse_what_is_not_trained(config: WanConfig, path: Path) -> None:
    """The only place that knows which Wan models newsreel trains. train.model.wan.Wan itself takes
    any channels and patch size.
    """
    if config.image_dim is not None or config.added_kv_proj_dim is not None:
        raise WeightsError(
            f"{path}: image cross-attention (Wan2.1 I2V) is not supported; use Wan2.2-I2V-A14B"
        )
    least = min(config.num_layers, config.num_attention_heads, config.attention_head_dim)
    if least < 1:
        raise WeightsError(
            f"{path}: num_layers, num_attention_heads and attention_head_dim must be at least 1, "
            f"not {least}; download the model again"
        )
    found = (config.in_channels, config.out_channels, config.patch_size)
    trained = {(kind.in_channels, kind.out_channels, (1, 2, 2)): kind.name for kind in KINDS}
    if found not in trained:
        raise WeightsError(
            f"{path}: in_channels, out_channels and patch_size are {found}, which no model has "
            f"that newsreel trains: {', '.join(f'{trained[key]} {key}' for key in trained)}"
        )
    if not config.cross_attn_norm or config.attention_head_dim % 2:
        raise WeightsError(
            f"{path}: cross_attn_norm must be true and attention_head_dim even in Wan2.2"
        )


def tensor_sources(model: Wan) -> dict[str, list[str]]:
    """Our parameter name -> the diffusers tensors that fill it, in row order."""
    sources: dict[str, list[str]] = {"scale_shift_table": ["scale_shift_table"]}
    for path, module in model.named_modules():
        if isinstance(module, Projections):
            prefix = ".".join(path.split(".")[:2]) + "." if path.startswith("blocks.") else ""
            for kind in ("weight", "bias"):
                sources[f"{path}.{kind}"] = [f"{prefix}{name}.{kind}" for name in module.names]
    for index in range(len(model.blocks)):
        for ours, theirs in _NORMS.items():
            sources[f"blocks.{index}.{ours}"] = [f"blocks.{index}.{theirs}"]
    return sources


def held_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """In what a parameter of Wan is held: GEMMs' in the compute `dtype`, the rest in float32."""
    # only Projections have such parameters
    is_gemm = name.endswith((".weight", ".bias"))
    return dtype if is_gemm and name.split(".")[0] not in _FLOAT32_MODULES else torch.float32


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name inside `folder`."""
    if (folder / INDEX).exists():
        try:
            return msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index).weight_map
        except msgspec.MsgspecError as error:
            raise WeightsError(f"{folder / INDEX}: {error}; download the model again") from error
    if not (folder / SINGLE).exists():
        raise WeightsError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there; download the model again"
        )
    with _open(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: {error}; download the model again") from error


def _assign(model: Wan, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, torch.nn.Parameter(tensor, requires_grad=False))
