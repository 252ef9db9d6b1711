"""The configuration of the rules: what is good enough, what the prompt says, how clips are split
and cut into windows. All of it decides bytes, so all of it is part of the recipe.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from loader.shape import WAN21, Bucket

# A limit that a rule compares with; 0 switches the rule off.
CountLimit = Annotated[int, Meta(ge=0)]
SizeLimit = Annotated[float, Meta(ge=0, lt=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveInt = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0, lt=1e6)]


class FiltersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds of quality.py; 0 switches a rule off. Durations are the clip's, captions those
    of all its shots.
    """

    score_only: bool = False  # compute everything, reject nothing that can be encoded
    media_types: tuple[Literal["video", "image"], ...] = ("video", "image")
    min_duration_s: SizeLimit = 3.0
    max_duration_s: SizeLimit = 30.0
    min_caption_chars: CountLimit = 1
    max_caption_chars: CountLimit = 0
    max_word_run: CountLimit = 9  # the same word ten times in a row is a reason
    max_char_run: CountLimit = 14
    # of the caption's characters: neither letter, digit, space nor .,!?'"()
    max_special_share: Share = 0.3
    require_resolution: bool = True  # the label must declare a readable resolution
    # reversed, impossible, or past the probed end
    wrong_timecodes: Literal["reject", "whole_clip"] = "reject"
    min_short_side_px: CountLimit = 0  # of the probed picture
    max_upscale: SizeLimit = 0  # resize factor from the source to the bucket


class PromptConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which sentences make the prompt of a window, in this order."""

    scene: bool = True
    object: bool = True
    semantic: bool = True
    stt: bool = False
    application: bool = False


class SplitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Programme groups go to val by a hash of (seed, group): stable when data is added."""

    val_share: Share = 0.102
    group_by: tuple[Literal["station", "date", "neighbourhood"], ...] = (
        "station",
        "date",
        "neighbourhood",
    )
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError without a name to group by."""
        if not self.group_by:
            raise ValueError(
                "split.group_by is empty: all clips would be one group, on one side of the split"
            )


class WindowsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which stretches of a clip become samples. A clip takes the bucket of the nearest aspect
    ratio and most frames.
    """

    buckets: tuple[str, ...]  # WIDTHxHEIGHTxFRAMES; those of one frame are for images
    fps: Rate = 24.0  # the model's: 24 for Wan2.2-TI2V-5B, 16 for A14B and Wan2.1
    per_shot: PositiveInt = 1  # at most this many windows, spread evenly and never overlapping
    samples_per_shard: PositiveInt = 128
    fit: Literal["letterbox", "crop"] = "letterbox"

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that no model takes, or if there is none."""
        for text in self.buckets:
            # the finest grid of all models; that of encode.model is checked once it is known
            WAN21.parse(text)
        if not self.buckets:
            raise ValueError(
                'windows.buckets is empty: name at least one shape, e.g. "1280x704x49"'
            )

    def buckets_for(self, media_type: str) -> list[Bucket]:
        """Shapes of one frame are for images, the others for video."""
        is_image = media_type == "image"
        parsed = map(Bucket.parse, self.buckets)
        return [bucket for bucket in parsed if (bucket.num_frames == 1) == is_image]


class RulesConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the rules are told, as the stages hand it on."""

    filters: FiltersConfig
    prompt: PromptConfig
    split: SplitConfig
    windows: WindowsConfig
