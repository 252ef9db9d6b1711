"""The recipe of a build: one TOML file, decoded strictly into ShardgenConfig and echoed, resolved, into the output.

What decides the bytes of a dataset (windows, prompts, models, number formats) and what merely decides how fast they
come (workers, connections) stand in one file, because that is what a user edits; `recipe_of` picks the former.
"""

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from loader.config import ConfigError
from loader.sample import Bucket

TARGET = re.compile(r"(>=|<=) *(\d+(?:\.\d+)?)")


class LabelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the labels lie and which of them to take."""

    root: str  # folder of label files, read recursively, never written
    limit: int = 0  # take the first N label files in path order; 0: all
    sample_fraction: float = 1.0  # take this share, chosen by a hash of the clip id
    max_bytes: int = 1 << 20  # a larger label file is refused unread
    workers: int = 0  # parser processes; 0: one per CPU


class FiltersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Thresholds of quality.py; 0 switches a rule off. Durations are the clip's, captions those of all its shots."""

    score_only: bool = False  # compute everything, reject nothing that can be encoded
    media_types: tuple[Literal["video", "image"], ...] = ("video", "image")
    min_duration_s: float = 3.0
    max_duration_s: float = 30.0
    min_caption_chars: int = 1
    max_caption_chars: int = 0
    max_word_run: int = 9  # the same word ten times in a row is a reason
    max_char_run: int = 14
    max_special_share: float = 0.3  # of the caption's characters: neither letter, digit, space nor .,!?'"()
    require_resolution: bool = True  # the label must declare a readable resolution
    wrong_timecodes: Literal["reject", "whole_clip"] = "reject"  # reversed, impossible, or past the probed end
    min_short_side_px: int = 0  # of the probed picture
    max_upscale: float = 0  # resize factor from the source to the bucket


class PromptConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which sentences make the prompt of a window, in this order."""

    scene: bool = True
    object: bool = True
    semantic: bool = True
    stt: bool = False
    application: bool = False


class SplitConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Programme groups go to val by a hash of (seed, group): stable when data is added."""

    val_share: float = 0.102
    group_by: tuple[Literal["station", "date", "neighbourhood"], ...] = ("station", "date", "neighbourhood")
    seed: int = 0


class WindowsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which stretches of a clip become samples. A clip takes the bucket of the nearest aspect ratio and most frames."""

    buckets: tuple[str, ...]  # WIDTHxHEIGHTxFRAMES; those of one frame are for images
    fps: float = 24.0
    per_shot: int = 1  # at most this many windows, spread evenly and never overlapping
    samples_per_shard: int = 128
    fit: Literal["letterbox", "crop"] = "letterbox"


class FetchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Media lie beside their label or behind its URL. Local files are read in place, never copied."""

    schemes: tuple[Literal["http", "https"], ...] = ("https", "http")
    cache: str = ""  # folder for downloaded media; empty: OUTPUT/cache
    cache_limit_gib: float = 500.0
    workers: int = 16  # files in flight, hashing local ones included
    per_host: int = 8
    timeout_s: float = 30.0
    retries: int = 4
    backoff_s: float = 0.5  # before the first retry; doubled each time, with jitter
    ask_again: bool = False  # ask also for what a server refused before (404, 403)
    max_file_gib: float = 8.0


class EncodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The models and number formats that decide a shard's bytes."""

    model: str  # folder of Wan2.2-TI2V-5B in diffusers layout
    device: str = "cpu"  # "cpu" or "cuda"; with several GPUs the executor starts one process for each
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int = 1  # torch threads per process: part of what decides the bytes
    text_batch: int = 8
    vae_batch: int = 1
    zstd_level: int = 3
    jpg_quality: int = 95
    jpg_for_images: bool = False
    mp4: bool = False
    mp4_encoder: Literal["auto", "libx264", "h264_nvenc"] = "auto"


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who runs the shards."""

    kind: Literal["local", "ray"] = "local"
    workers: int = 1
    decode_threads: int = 2  # clips decoded ahead of the encoder, per worker
    address: str = ""  # of a Ray cluster; empty: start one here


class TargetsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each check of the report has to reach: ">= 99.5" or "<= 25", in the check's unit; empty: not set."""

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
        """Raises ValueError (msgspec makes it a ValidationError, load_toml a ConfigError) for impossible values."""
        for text in self.windows.buckets:
            Bucket.parse(text)
        checks = [
            (bool(self.windows.buckets), "windows.buckets is empty: name at least one shape, e.g. \"1280x704x49\""),
            (self.windows.fps > 0, f"windows.fps is {self.windows.fps}: it must be above 0"),
            (self.windows.per_shot >= 1, f"windows.per_shot is {self.windows.per_shot}: it must be at least 1"),
            (self.windows.samples_per_shard >= 1, "windows.samples_per_shard must be at least 1"),
            (0 <= self.split.val_share <= 1, f"split.val_share is {self.split.val_share}: a share lies in 0..1"),
            (0 < self.labels.sample_fraction <= 1, "labels.sample_fraction must lie in (0, 1]"),
            (self.executor.workers >= 1, "executor.workers must be at least 1"),
            (self.fetch.workers >= 1 and self.fetch.per_host >= 1, "fetch.workers and per_host must be at least 1"),
        ]
        for fine, message in checks:
            if not fine:
                raise ValueError(message)


def recipe_of(config: ShardgenConfig) -> dict[str, Any]:
    """What of the configuration decides the bytes of a shard, as plain JSON types, for the manifest."""
    plain = msgspec.to_builtins(config)
    encode = {key: value for key, value in plain["encode"].items() if key != "model"}
    return {"filters": plain["filters"], "prompt": plain["prompt"], "split": plain["split"],
            "windows": plain["windows"], "encode": encode}


def cache_folder(config: ShardgenConfig) -> Path:
    """Where downloaded media are kept."""
    return Path(config.fetch.cache) if config.fetch.cache else Path(config.output) / "cache"


def check_paths(config: ShardgenConfig) -> None:
    """Raises ConfigError when the label root is no folder, or the output lies inside it."""
    root, output = Path(config.labels.root).resolve(), Path(config.output).resolve()
    if not root.is_dir():
        raise ConfigError(f"labels.root = {root}: no such folder; it must hold {{image,video}}/batch_NNNN/ID.json")
    if output == root or root in output.parents:
        raise ConfigError(f"output = {output} lies inside labels.root = {root}: choose a folder outside, the label "
                          f"tree is never written")
