"""The TOML of an evaluation: `python -m tools.evaluate generate CONFIG.toml`."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from loader.models import has_experts

Positive = Annotated[int, Meta(ge=1)]

# i3d_torchscript.pt, the original TF-Hub graph: 51,235,320 bytes
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
I3D_SOURCE = "i3d_torchscript.pt, for example of the repository flateon/FVD-I3D-torchscript"


class SetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[set]` table: which captions of the val split, and how often each."""

    # captions, the categories in turn; below 20 there are no intervals
    num_prompts: Positive = 40
    # clips of each; the same noise for every variant
    num_seeds: Positive = 4
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 0
    # captions of these categories alone; empty: of all
    categories: list[str] = []
    # so many prompts' clips are decoded to pictures, all if 0; latents are kept of every clip
    num_decoded: Annotated[int, Meta(ge=0)] = 0


class SamplingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[sampling]` table: equal for base and candidates. shift: 5 at 720p, 3 at 480p."""

    num_steps: Positive = 25
    shift: Annotated[float, Meta(gt=0.0)] = 5.0
    # of a shape, "832x480x49" = 3.0, instead
    shifts: dict[str, Annotated[float, Meta(gt=0.0)]] = {}
    guidance: Annotated[float, Meta(ge=1.0)] = 5.0
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"


class FVDConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[fvd]` table: the extractor. Another one than I3D needs a name of its own."""

    # a TorchScript file; empty: FVD is not measured
    weights: str = ""
    sha256: str = I3D_SHA256
    # how the figure is called: "fvd" is I3D's alone
    name: Annotated[str, Meta(pattern="^[a-z][a-z0-9_]*$")] = "fvd"
    num_frames: Positive = 16
    size_px: Positive = 224


class ClipConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[clip]` table: the image-text encoder, a local folder that AutoModel loads."""

    # for example a download of google/siglip2-base-patch16-224; empty: not measured
    model: str = ""
    # which loss it was trained with: their cosines are not on one scale
    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    num_frames: Positive = 8
    max_tokens: Positive = 64


class TargetsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[targets]` table: what the users' criteria ask for."""

    fvd: Annotated[float, Meta(gt=0.0)] = 1140.0
    clip_cosine: Annotated[float, Meta(gt=0.0)] = 0.3


class EvaluateConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One evaluation."""

    # its folder; the dashboard finds RUN/evaluations/NAME
    output: Annotated[str, Meta(min_length=1)]
    # a folder in diffusers' layout
    model: str
    # folders with a manifest.json and a val split
    datasets: Annotated[list[str], Meta(min_length=1)]
    # name -> LoRA file in diffusers' keys; the base and the real clips are always there
    candidates: dict[str, str] = {}
    set: SetConfig = SetConfig()
    sampling: SamplingConfig = SamplingConfig()
    fvd: FVDConfig = FVDConfig()
    clip: ClipConfig = ClipConfig()
    targets: TargetsConfig = TargetsConfig()

    @property
    def folder(self) -> Path:
        return Path(self.output)


def check(config: EvaluateConfig) -> None:
    """What can be known before any time is spent. Raises ValueError."""
    if has_experts(Path(config.model)):
        raise ValueError(
            f"{config.model}: a model of two experts can't be evaluated yet; tools.generate draws "
            f"with both, --lora-high and --lora-low"
        )
    for name in config.candidates:
        if name in ("real", "base") or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                f"candidates.{name}: a name of letters, digits, - and _ other than real and base"
            )
    if config.fvd.name == "fvd" and config.fvd.sha256 != I3D_SHA256:
        raise ValueError(
            "fvd.sha256 is not that of I3D, so the figure is no FVD: give it its own fvd.name, for "
            'example "fd_videomae"'
        )
