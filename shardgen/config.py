"""The recipe of a build: one TOML file, decoded strictly into ShardgenConfig and echoed,
resolved, into the output.

What decides the bytes of a dataset (windows, prompts, models, number formats) and what merely
decides how fast they come (workers, connections) stand in one file, because that is what a user
edits; `recipe_of` picks the former.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loader.config import ConfigError
from loader.shape import WAN22

# what would fail late, or do something else in silence (0 windows a batch: all of them), is
# refused at the start
Some = Annotated[int, Meta(ge=1)]
Number = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Limit = Annotated[float, Meta(ge=0, lt=1e9)]
Positive = Annotated[float, Meta(gt=0, lt=1e6)]
TARGET = re.compile(r"(>=|<=) *(\d+(?:\.\d+)?)")


class LabelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the labels lie and which of them to take."""

    root: str  # folder of label files, read recursively, never written
    limit: Number = 0  # take the first N label files in path order; 0: all
    # take this share, chosen by a hash of the clip id
    sample_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    max_bytes: Some = 1 << 20  # a larger label file is refused unread
    workers: Number = 0  # parser processes; 0: one per CPU


class FiltersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds of quality.py; 0 switches a rule off. Durations are the clip's, captions those
    of all its shots.
    """

    score_only: bool = False  # compute everything, reject nothing that can be encoded
    media_types: tuple[Literal["video", "image"], ...] = ("video", "image")
    min_duration_s: Limit = 3.0
    max_duration_s: Limit = 30.0
    min_caption_chars: Number = 1
    max_caption_chars: Number = 0
    max_word_run: Number = 9  # the same word ten times in a row is a reason
    max_char_run: Number = 14
    # of the caption's characters: neither letter, digit, space nor .,!?'"()
    max_special_share: Share = 0.3
    require_resolution: bool = True  # the label must declare a readable resolution
    # reversed, impossible, or past the probed end
    wrong_timecodes: Literal["reject", "whole_clip"] = "reject"
    min_short_side_px: Number = 0  # of the probed picture
    max_upscale: Limit = 0  # resize factor from the source to the bucket


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


class WindowsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which stretches of a clip become samples. A clip takes the bucket of the nearest aspect
    ratio and most frames.
    """

    buckets: tuple[str, ...]  # WIDTHxHEIGHTxFRAMES; those of one frame are for images
    fps: Positive = 24.0
    per_shot: Some = 1  # at most this many windows, spread evenly and never overlapping
    samples_per_shard: Some = 128
    fit: Literal["letterbox", "crop"] = "letterbox"


class FetchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Media lie beside their label or behind its URL. Local files are read in place, never
    copied.
    """

    schemes: tuple[Literal["http", "https"], ...] = ("https", "http")
    cache: str = ""  # folder for downloaded media; empty: OUTPUT/cache
    cache_limit_gib: Positive = 500.0
    workers: Some = 16  # files in flight, hashing local ones included
    per_host: Some = 8
    timeout_s: Positive = 30.0
    retries: Annotated[int, Meta(ge=0, le=100)] = 4
    # before the first retry; doubled each time, with jitter
    backoff_s: Annotated[float, Meta(ge=0, le=3600)] = 0.5
    ask_again: bool = False  # ask also for what a server refused before (404, 403)
    max_file_gib: Positive = 8.0


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The models and number formats that decide a shard's bytes."""

    model: str  # folder of Wan2.2-TI2V-5B in diffusers layout
    # "cpu" or "cuda"; with several GPUs the executor starts one process for each
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: Some = 1  # torch threads per process: part of what decides the bytes
    text_batch: Some = 8
    vae_batch: Some = 1
    zstd_level: Annotated[int, Meta(ge=1, le=22)] = 3
    jpg_quality: Annotated[int, Meta(ge=1, le=100)] = 95
    jpg_for_images: bool = False
    mp4: bool = False
    mp4_encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto"


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs the shards."""

    kind: Literal["local", "ray"] = "local"
    workers: Some = 1
    decode_threads: Some = 2  # clips decoded ahead of the encoder, per worker
    address: str = ""  # of a Ray cluster; empty: start one here


class TargetsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each check of the report has to reach: ">= 99.5" or "<= 25", in the check's unit;
    empty: not set.
    """

    file_validity: str = ""
    format_agreement: str = ""
    size_agreement: str = ""
    length_agreement: str = ""
    rate_agreement: str = ""
    mean_length: str = ""
    over_25_s: str = ""
    total_length: str = ""
    words_per_description: str = ""
    sentences_per_description: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a target that says neither at least nor at most."""
        for name in self.__struct_fields__:
            if (text := getattr(self, name)) and TARGET.fullmatch(text) is None:
                raise ValueError(f'report.targets.{name} = {text!r}: write ">= 99.5" or "<= 25"')


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the quality report measures the data by; no byte of a shard depends on it."""

    targets: TargetsConfig = TargetsConfig()


class ShardgenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole build: `shardgen build CONFIG.toml`."""

    output: str  # the dataset folder
    # 2 also names the latent layout; version 1 means that of Wan2.2-TI2V-5B, and older readers
    # take it
    manifest_version: Literal[1, 2] = 1
    labels: LabelsConfig
    windows: WindowsConfig
    encode: EncodeConfig
    filters: FiltersConfig = FiltersConfig()
    prompt: PromptConfig = PromptConfig()
    split: SplitConfig = SplitConfig()
    fetch: FetchConfig = FetchConfig()
    executor: ExecutorConfig = ExecutorConfig()
    report: ReportConfig = ReportConfig()

    def __post_init__(self) -> None:
        """Raises ValueError (msgspec makes it a ValidationError, load_toml a ConfigError) for
        impossible values.
        """
        for text in self.windows.buckets:
            WAN22.parse(text)
        if not self.windows.buckets:
            raise ValueError(
                'windows.buckets is empty: name at least one shape, e.g. "1280x704x49"'
            )
        if not self.split.group_by:
            raise ValueError(
                "split.group_by is empty: all clips would be one group, on one side of the split"
            )


def recipe_of(config: ShardgenConfig) -> dict[str, Any]:
    """What of the configuration decides the bytes of a shard, as plain JSON types, for the
    manifest.
    """
    plain = msgspec.to_builtins(config)
    encode = {key: value for key, value in plain["encode"].items() if key != "model"}
    return {
        "filters": plain["filters"],
        "prompt": plain["prompt"],
        "split": plain["split"],
        "windows": plain["windows"],
        "encode": encode,
    }


def cache_folder(config: ShardgenConfig) -> Path:
    """Where downloaded media are kept."""
    return Path(config.fetch.cache) if config.fetch.cache else Path(config.output) / "cache"


def check_paths(config: ShardgenConfig) -> None:
    """Raises ConfigError when the label root is no folder, or the output lies inside it."""
    root, output = Path(config.labels.root).resolve(), Path(config.output).resolve()
    if not root.is_dir():
        raise ConfigError(
            f"labels.root = {root}: no such folder; it must hold {{image,video}}/batch_NNNN/ID.json"
        )
    if output == root or root in output.parents:
        raise ConfigError(
            f"output = {output} lies inside labels.root = {root}: choose a folder outside, the label "
            f"tree is never written"
        )
