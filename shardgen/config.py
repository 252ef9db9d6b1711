"""A whole build as one TOML file: decoded strictly into ShardgenConfig and echoed, resolved, into
the output.

What decides the bytes of a dataset (windows, prompts, models, number formats) and what merely
decides how fast they come (workers, connections) stand in one file, because that is what a user
edits; `recipe_of` picks the former. Each table is a Struct of the sub-package that obeys it;
`take_apart` hands them on, and nothing below this module knows the whole.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from loader.config import ConfigError, dump_toml
from loader.models import FIRST_FRAME_AND_GREY, KINDS, ModelError, read_kind, read_layout
from loader.shape import WAN22, Bucket, LatentLayout
from shardgen.build import BuildInputs
from shardgen.encode.config import EncodeConfig, ExecutorConfig, encode_recipe
from shardgen.media.pictures import choose_mp4_encoder
from shardgen.report.config import ReportConfig
from shardgen.rules.config import (
    FiltersConfig,
    PromptConfig,
    RulesConfig,
    SplitConfig,
    WindowsConfig,
)
from shardgen.stages.config import FetchConfig, LabelsConfig


class ShardgenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole build: `shardgen build CONFIG.toml`."""

    output: Annotated[str, Meta(min_length=1)]  # the dataset folder
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


def rules_of(config: ShardgenConfig) -> RulesConfig:
    """The tables that the rules obey."""
    return RulesConfig(
        filters=config.filters,
        prompt=config.prompt,
        split=config.split,
        windows=config.windows,
    )


def recipe_of(config: ShardgenConfig) -> dict[str, Any]:
    """What of the configuration decides the bytes of a shard, as plain JSON types, for the
    manifest.
    """
    plain = msgspec.to_builtins(config)
    return {
        "filters": plain["filters"],
        "prompt": plain["prompt"],
        "split": plain["split"],
        "windows": plain["windows"],
        "encode": encode_recipe(config.encode),
    }


def take_apart(config: ShardgenConfig) -> BuildInputs:
    """What `build` is told. Raises ConfigError for impossible paths and for windows that the model
    does not take, ModelError for a folder without one, Mp4Error if the H.264
    encoder that was asked for does not work here.
    """
    check_paths(config)
    layout = check_model(config)
    # From here on the encoder has its name, because it is part of the recipe.
    wanted = config.encode.mp4_encoder if config.encode.mp4 else "libx264"
    encode = replace(config.encode, mp4_encoder=choose_mp4_encoder(wanted))
    config = replace(config, encode=encode)
    output = Path(config.output)
    return BuildInputs(
        output=output,
        labels=config.labels,
        rules=rules_of(config),
        fetch=config.fetch,
        cache=Path(config.fetch.cache) if config.fetch.cache else output / "cache",
        encode=config.encode,
        executor=config.executor,
        targets=config.report.targets,
        manifest_version=config.manifest_version,
        layout=layout,
        recipe=recipe_of(config),
        config_toml=dump_toml(config),
    )


def check_paths(config: ShardgenConfig) -> None:
    """Raises ConfigError when the label root is no folder, or what is written lies inside it."""
    root = Path(config.labels.root).resolve()
    if not root.is_dir():
        raise ConfigError(
            f"labels.root = {root}: no such folder; it must hold {{image,video}}/batch_NNNN/ID.json"
        )
    for key, folder in ("output", config.output), ("fetch.cache", config.fetch.cache):
        if folder and Path(folder).resolve().is_relative_to(root):
            raise ConfigError(
                f"{key} = {folder} lies inside labels.root = {root}: choose a folder outside, the "
                f"label tree is never written"
            )


def check_model(config: ShardgenConfig) -> LatentLayout:
    """Do the windows fit the model that will be trained? Returns its latent layout. What the
    transformer says is compared where it is there: encoding needs the VAE and the text encoder
    alone. Raises ConfigError, ModelError.
    """
    windows, condition, model = config.windows, config.encode.condition, Path(config.encode.model)
    layout = read_layout(model)
    names = " and ".join(kind.name for kind in KINDS if kind.layout == layout)
    fps = next(kind.fps for kind in KINDS if kind.layout == layout)
    for shape in windows.buckets:
        layout.parse(shape)
        if condition and Bucket.parse(shape).num_frames == 1:
            raise ConfigError(
                f"windows.buckets has {shape}, a shape of images: with encode.condition = "
                f'"{condition}" samples are for image to video, which an image can\'t be; leave '
                f"it out"
            )
    if windows.fps != fps:
        raise ConfigError(
            f"windows.fps = {windows.fps:g}, where {names} learn at {fps:g} frames a second; set "
            f"windows.fps = {fps:.1f}"
        )
    if condition and layout == WAN22:
        raise ConfigError(
            f'encode.condition = "{condition}" is for Wan2.2-I2V-A14B; {model} is {names}, which '
            f"takes its first frame from the latent: leave the key out"
        )
    try:
        wanted = read_kind(model).condition
    except ModelError:
        wanted = ""
    if wanted and not condition:
        raise ConfigError(
            f"encode.condition is not set: {model} is Wan2.2-I2V-A14B, whose samples need one; set "
            f'encode.condition = "{FIRST_FRAME_AND_GREY}"'
        )
    return layout
