"""A feed without a configuration file: for tests and benchmarks of the loader."""

from pathlib import Path
from typing import Any

import torch

from loader.batching import Batching
from loader.feed import Feed
from loader.feed_config import FeedConfig
from loader.vae.encoder import VAEEncoder


def make_feed(
    *datasets: Path | str,
    device: torch.device | str = "cpu",
    vae: VAEEncoder | None = None,
    **settings: Any,
) -> Feed:
    """A feed of these datasets; `settings` are fields of FeedConfig and Batching."""
    is_data = FeedConfig.__struct_fields__
    data = {name: value for name, value in settings.items() if name in is_data}
    batching = {name: value for name, value in settings.items() if name not in is_data}
    config = FeedConfig(datasets=[str(dataset) for dataset in datasets], **data)
    return Feed(config, Batching(**batching), device, vae)
