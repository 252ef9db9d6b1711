"""FeedConfig: the table [data] of a training run. Torch-free."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class FeedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which datasets, and what is done with their samples."""

    datasets: Annotated[list[str], Meta(min_length=1)]  # folders or URLs with a manifest.json
    weights: list[float] = []  # each dataset's share of the batches; default: by size
    # an exclusions.csv for each dataset, "" for none: the samples of these labels take no part
    exclude: list[str] = []
    # where the clean first frame of I2V comes from: the latent's own, or the picture in the shard
    condition: Literal["latent", "raw"] = "latent"
    i2v_share: Share = 0.4  # of the video samples
    caption_dropout: Share = 0.1
    num_threads: Positive = 4  # micro-batches read at a time
    max_ahead: Positive = 4  # micro-batches that are ready or being read
    # so many samples of each dataset may a rank find damaged and replace, from its start on
    max_damaged: Annotated[int, Meta(ge=0)] = 16
    cache_dir: str = ""  # keeps what was read from URLs, shared by the ranks of a host
    cache_gib: Annotated[float, Meta(gt=0.0)] = 64.0
