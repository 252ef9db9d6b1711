"""Any LoRA file of a model of this kind, read into one form: for each adapted layer A, B and the
factor of B A.

    keys                                                     alpha
    transformer.blocks.N.attn1.to_q.lora_A.weight            diffusers: metadata of the file
    base_model.model.blocks.N.attn1.to_q.lora_A.weight       PEFT: adapter_config.json beside it
    diffusion_model.blocks.N.self_attn.q.lora_A.weight       ComfyUI: a tensor .alpha per layer
    lora_unet_blocks_N_self_attn_q.lora_down.weight          kohya's: the same

Layers go by diffusers' or by Wan's own names, factors by A and B or by down and up, whatever the
prefix; blocks.N... alone is DiffSynth-Studio's. What is no plain LoRA (DoRA, biases, whole
differences) and layers that we don't adapt are refused by name, never left out in silence.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.lora.adapters import TARGETS, LoRAError

METADATA_KEY = "lora_adapter_metadata"
# of our own entry: which expert of a model of two, "high" or "low"; the tensors have equal names
EXPERT_KEY = "newsreel_expert"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# layers by their names in Wan's own code, which ComfyUI and kohya's trainer follow
WAN_NAMES = {
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
_TARGET_OF = {name: name for name in TARGETS} | {wan: name for name, wan in WAN_NAMES.items()}
_TARGET_OF_UNDERSCORES = {name.replace(".", "_"): target for name, target in _TARGET_OF.items()}

_PEFT_PREFIX = "base_model.model."
_DOTTED = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.|model\.diffusion_model\.)?"
    r"blocks\.(?P<block>\d+)\.(?P<layer>[\w.]+?)\."
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?P<weight>\.weight)?"
)
_KOHYA = re.compile(
    r"lora_unet_blocks_(?P<block>\d+)_(?P<layer>\w+)\."
    r"(?P<part>lora_down|lora_up|alpha)(?P<weight>\.weight)?"
)
_PARTS = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b", "alpha": "alpha"}


class Adapter(NamedTuple):
    """Of one layer: its update is scale * B A. a_RK, b_NR: float32, on the CPU. scale: None where
    the file says no alpha, which all its readers take as alpha = rank, a scale of 1.
    """

    a_RK: Tensor
    b_NR: Tensor
    scale: float | None


class AdapterSettings(msgspec.Struct, frozen=True):
    """What of PEFT's adapter_config.json, and of diffusers' metadata, decides the update."""

    lora_alpha: float | None = None
    # a layer whose name ends in what the key matches has that alpha
    alpha_pattern: dict[str, float] = {}
    # alpha / sqrt(rank) instead of alpha / rank
    use_rslora: bool = False
    use_dora: bool = False

    def scale(self, name: str, rank: int) -> float | None:
        alpha = self.lora_alpha
        for pattern, value in self.alpha_pattern.items():
            # as PEFT compares them
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = value
                break
        if alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora(path: Path) -> dict[str, Adapter]:
    """ "blocks.N.TARGET" -> its adapter, of a file, or of a folder that PEFT has written.

    Raises LoRAError for a file that can't be read or is no plain LoRA of such a model.
    """
    if path.is_dir():
        path = path / PEFT_FILE
    tensors, metadata = _open(path)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        place = _place(key)
        # a factor that comes a second time, by its other name, is as strange
        if place is None or place.part in found.get(place.name, {}):
            strange.append(key)
        else:
            found.setdefault(place.name, {})[place.part] = tensor
    if strange or not found:
        raise LoRAError(
            f"{path}: {len(strange)} of its {len(tensors)} tensors are no LoRA factors of layers "
            f"that can be adapted here, the first of them {sorted(strange)[:3]}; give a plain LoRA "
            f"of {', '.join(TARGETS)}"
        )
    settings = _settings(
        path, metadata, is_peft=any(key.startswith(_PEFT_PREFIX) for key in tensors)
    )
    return {name: _adapter(path, name, parts, settings) for name, parts in sorted(found.items())}


def expert_of(path: Path) -> str | None:
    """Of which expert a LoRA is, where the file says so. Raises LoRAError."""
    if path.is_dir():
        return None
    return _open(path)[1].get(EXPERT_KEY)


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LoRAError(
            f"{path}: can't be read as a LoRA file ({error}); give another one, or none"
        ) from error


class _Place(NamedTuple):
    """What a tensor is: "a", "b" or "alpha" of "blocks.N.TARGET"."""

    name: str
    part: str


def _place(key: str) -> _Place | None:
    """Of a tensor's key; None for any that is no such thing."""
    for pattern, targets in ((_DOTTED, _TARGET_OF), (_KOHYA, _TARGET_OF_UNDERSCORES)):
        match = pattern.fullmatch(key)
        if match is None or match["layer"] not in targets:
            continue
        part = _PARTS[match["part"]]
        if (part == "alpha") == bool(match["weight"]):
            continue
        return _Place(f"blocks.{int(match['block'])}.{targets[match['layer']]}", part)
    return None


def _settings(path: Path, metadata: dict[str, str], is_peft: bool) -> AdapterSettings:
    where, data = f"the metadata of {path}", metadata.get(METADATA_KEY, "{}").encode()
    if is_peft:
        config = path.with_name(PEFT_CONFIG)
        where = str(config)
        try:
            data = config.read_bytes()
        except OSError as error:
            raise LoRAError(
                f"{path}: has PEFT's keys, whose alpha stands in {config}, and that can't be read "
                f"({error.strerror}); put it beside the file"
            ) from error
    try:
        entries: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        named = {key.removeprefix("transformer."): value for key, value in entries.items()}
        # PEFT writes null where there is none
        given = {key: value for key, value in named.items() if value is not None}
        settings = msgspec.convert(given, AdapterSettings)
    except msgspec.MsgspecError as error:
        raise LoRAError(f"{path}: can't be used, {where}: {error}; give another file") from error
    for pattern in settings.alpha_pattern:
        try:
            re.compile(pattern)
        except re.error as error:
            raise LoRAError(
                f"{path}: can't be used, {where}: alpha_pattern {pattern!r} is no regular "
                f"expression ({error}); give another file"
            ) from error
    if settings.use_dora:
        raise LoRAError(f"{path}: is a DoRA by {where}; give a plain LoRA")
    return settings


def _adapter(path: Path, name: str, parts: dict[str, Tensor], settings: AdapterSettings) -> Adapter:
    if not {"a", "b"} <= parts.keys():
        missing = "A (down)" if "a" not in parts else "B (up)"
        raise LoRAError(
            f"{path}: {name} has no {missing}; the file is incomplete, give another one"
        )
    a_RK, b_NR = parts["a"].float(), parts["b"].float()
    is_pair = a_RK.dim() == b_NR.dim() == 2 and a_RK.shape[0] == b_NR.shape[1] > 0
    if not is_pair:
        raise LoRAError(
            f"{path}: {name} has A {list(a_RK.shape)} and B {list(b_NR.shape)}, which are no pair "
            f"of [rank, in] and [out, rank]; give another file"
        )
    rank = a_RK.shape[0]
    scale = settings.scale(name, rank)
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise LoRAError(
                f"{path}: {name} has an alpha of shape {list(parts['alpha'].shape)}, which must be "
                f"one number; give another file"
            )
        scale = parts["alpha"].item() / rank
    if not (a_RK.isfinite().all() and b_NR.isfinite().all() and math.isfinite(scale or 0.0)):
        raise LoRAError(
            f"{path}: A, B or alpha of {name} holds inf or NaN, so its training had failed; give "
            f"another file"
        )
    return Adapter(a_RK, b_NR, scale)
