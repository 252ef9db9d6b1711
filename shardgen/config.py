"""A whole build as one TOML file: decoded strictly into ShardgenConfig and echoed, resolved, into
the output.

What decides the bytes of a dataset (windows, prompts, models, number formats) and what merely
decides how fast they come (workers, connections) stand in one file, because that is what a user
edits; `recipe_of` picks the former. Each table is a Struct of the sub-package that obeys it;
`take_apart` hands them on, and nothing below this module knows the whole.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from loader.config import ConfigError, dump_toml
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
    """What `build` is told. Raises ConfigError for impossible paths, Mp4Error if the H.264
    encoder that was asked for does not work here.
    """
    check_paths(config)
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
        recipe=recipe_of(config),
        config_toml=dump_toml(config),
    )


def check_paths(config: ShardgenConfig) -> None:
    """Raises ConfigError when the label root is no folder, or the output lies inside it."""
    root, output = Path(config.labels.root).resolve(), Path(config.output).resolve()
    if not root.is_dir():
        raise ConfigError(
            f"labels.root = {root}: no such folder; it must hold {{image,video}}/batch_NNNN/ID.json"
        )
    if output == root or root in output.parents:
        raise ConfigError(
            f"output = {output} lies inside labels.root = {root}: choose a folder outside, the "
            f"label tree is never written"
        )
