"""Which Wan model a diffusers folder holds, and what follows for datasets and runs. Torch-free.

The models that newsreel trains differ by a few numbers. A folder says most of them: its VAE's
config.json the latent layout, its transformer's the channels, its model_index.json the noise level
at which one expert takes over from the other. The rest are those of the official configurations
(Wan2.2's wan/configs, Wan2.1's too): diffusers' converter writes another shift into scheduler/.
"""

from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from loader.files import cause_of
from loader.shape import WAN21, WAN22, LatentLayout

Expert = Literal["high", "low"]
ConfigT = TypeVar("ConfigT")
# of the manifest's `condition`: the VAE's latent of the first frame, and of grey frames after it
FIRST_FRAME_AND_GREY = "first_frame_and_grey"
INDEX = "model_index.json"
TRANSFORMER_OF: dict[Expert | None, str] = {
    None: "transformer",
    "high": "transformer",
    "low": "transformer_2",
}


class ModelError(ValueError):
    """A model folder, or what is asked of its model, that can't be; the message says what to do."""


class Guidance(NamedTuple):
    """Classifier-free guidance of each expert; of a model without experts both are the same."""

    high: float
    low: float


class ModelKind(NamedTuple):
    """One Wan model.

    in_channels, out_channels: of the transformer. shift: of the noise levels, in training and in
    sampling. boundary: the sigma, after the shift, from which on the high-noise expert works; None
    for a model without experts. condition: what KEY.condition.zst must mean, where the model takes
    more than the noised latent. i2v_share: the share of image-to-video samples that it takes; None:
    any.
    """

    name: str
    layout: LatentLayout
    in_channels: int
    out_channels: int
    fps: float
    shift: float
    guidance: Guidance
    boundary: float | None = None
    condition: str = ""
    i2v_share: float | None = None


TI2V_5B = ModelKind(
    "Wan2.2-TI2V-5B",
    WAN22,
    in_channels=48,
    out_channels=48,
    fps=24.0,
    shift=5.0,
    guidance=Guidance(5.0, 5.0),
)
T2V_A14B = ModelKind(
    "Wan2.2-T2V-A14B",
    WAN21,
    in_channels=16,
    out_channels=16,
    fps=16.0,
    shift=12.0,
    guidance=Guidance(high=4.0, low=3.0),
    boundary=0.875,
    i2v_share=0.0,
)
I2V_A14B = ModelKind(
    "Wan2.2-I2V-A14B",
    WAN21,
    in_channels=36,
    out_channels=16,
    fps=16.0,
    shift=5.0,
    guidance=Guidance(3.5, 3.5),
    boundary=0.9,
    condition=FIRST_FRAME_AND_GREY,
    i2v_share=1.0,
)
WAN21_T2V = ModelKind(
    "Wan2.1-T2V",
    WAN21,
    in_channels=16,
    out_channels=16,
    fps=16.0,
    shift=5.0,
    guidance=Guidance(5.0, 5.0),
    i2v_share=0.0,
)
KINDS = (TI2V_5B, T2V_A14B, I2V_A14B, WAN21_T2V)


def kind_of(in_channels: int, out_channels: int, *, has_experts: bool) -> ModelKind | None:
    """The model with these channels, None if there is none."""
    for kind in KINDS:
        channels = kind.in_channels, kind.out_channels
        if channels == (in_channels, out_channels) and has_experts == (kind.boundary is not None):
            return kind
    return None


class _Channels(msgspec.Struct):
    """Of transformer/config.json; all other fields are ignored."""

    in_channels: int
    out_channels: int


class _ModelIndex(msgspec.Struct):
    """Of model_index.json; all other fields are ignored."""

    boundary_ratio: float | None = None


class _VAE(msgspec.Struct):
    """Of vae/config.json; the defaults are diffusers' (Wan2.1)."""

    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    patch_size: int | None = None


def read_kind(model_dir: Path) -> ModelKind:
    """Which model the folder holds, with its own boundary. Of two experts one may be missing: a run
    trains the other. Raises ModelError.
    """
    path = model_dir / "transformer" / "config.json"
    second = model_dir / "transformer_2" / "config.json"
    if second.exists() and not path.exists():
        path = second
    channels = _read(path, _Channels)
    boundary = _boundary(model_dir)
    # A14B with one of its experts looks like Wan2.1 but for the boundary
    if channels.out_channels == WAN21.channels and not (model_dir / INDEX).exists():
        raise ModelError(
            f"{model_dir / INDEX}: missing, and without it a model of two experts can't be told "
            f"from Wan2.1; download it too"
        )
    kind = kind_of(channels.in_channels, channels.out_channels, has_experts=boundary is not None)
    if kind is None:
        known = ", ".join(f"{each.name} {each.in_channels}/{each.out_channels}" for each in KINDS)
        experts = "two experts" if boundary is not None else "one transformer"
        raise ModelError(
            f"{path}: in_channels/out_channels {channels.in_channels}/{channels.out_channels} with "
            f"{experts} is no model that newsreel trains ({known}); Wan2.1's image-to-video is "
            f"another architecture, take Wan2.2-I2V-A14B"
        )
    return kind if boundary is None else kind._replace(boundary=boundary)


def has_experts(model_dir: Path) -> bool:
    """Is it a model of two transformers, of which one may be missing? Raises ModelError for a
    model_index.json that can't be read.
    """
    return (model_dir / "transformer_2").is_dir() or _boundary(model_dir) is not None


def _boundary(model_dir: Path) -> float | None:
    path = model_dir / INDEX
    has_second = (model_dir / "transformer_2").is_dir()
    boundary = _read(path, _ModelIndex).boundary_ratio if path.exists() else None
    if has_second and boundary is None:
        raise ModelError(
            f"{model_dir}: has a transformer_2, but model_index.json is missing or names no "
            f"boundary_ratio, so it is not known where one expert takes over; download it again"
        )
    return boundary


def check_expert(kind: ModelKind, expert: Expert | None) -> None:
    """Raises ModelError unless `model.expert` is given just where the model has two."""
    if kind.boundary is None and expert is not None:
        raise ModelError(
            f'model.expert = "{expert}": {kind.name} is one transformer; leave the key out'
        )
    if kind.boundary is not None and expert is None:
        raise ModelError(
            f"model.expert is not set: {kind.name} is two transformers, of which a run trains one. "
            f'Set "high" (noise levels from {kind.boundary:g} on) or "low" (those below)'
        )


def check_i2v_share(kind: ModelKind, share: float) -> None:
    """Raises ModelError for a share of image-to-video samples that the model can't take."""
    if kind.i2v_share is not None and share != kind.i2v_share:
        what = "image to video" if kind.i2v_share else "text to video"
        raise ModelError(
            f"data.i2v_share = {share:g}: {kind.name} does {what} alone; set data.i2v_share = "
            f"{kind.i2v_share:.1f}"
        )


def read_layout(model_dir: Path) -> LatentLayout:
    """The layout of the latents that the folder's VAE makes. Raises ModelError."""
    path = model_dir / "vae" / "config.json"
    vae = _read(path, _VAE)
    stride_px = (vae.patch_size or 1) * 2 ** (len(vae.dim_mult) - 1)
    found = LatentLayout(vae.z_dim, stride_t=4, stride_px=stride_px, patch_px=2 * stride_px)
    if found not in (WAN21, WAN22):
        raise ModelError(
            f"{path}: {vae.z_dim} channels and a stride of {stride_px} pixels are of no model that "
            f"newsreel trains; take the vae folder of Wan2.2-TI2V-5B, Wan2.2-A14B or Wan2.1"
        )
    return found


def _read(path: Path, kind: type[ConfigT]) -> ConfigT:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelError(
            f"{path}: {cause_of(error)}; it must be part of a Wan model's diffusers folder, such "
            f"as a download of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        ) from error
