"""The trainer's checks of a configuration, as tools.plan makes them: without its machine. Weights,
`lora.init` and `samples.prompts` need not be on this one; what is there is checked.
"""

from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from loader.identity import check_identity, folder_xxh3
from loader.models import ModelKind
from loader.shape import Bucket
from loader.store import read_dataset
from train.base import laws_of
from train.choices import check_math
from train.config import TrainConfig
from train.flow import check_shifts
from train.lora.adapters import check_targets
from train.lora.start import read_start, wanted_of
from train.model.load import check_weights
from train.model.wan import WanConfig
from train.subjects import check_samples


def check_run(
    config: TrainConfig,
    kind: ModelKind,
    wan: WanConfig,
    transformer: Path,
    *,
    reads_datasets: bool,
) -> None:
    """As if on a GPU. reads_datasets: whether `samples.keys` are looked up. Raises ValueError."""
    check_targets(config.lora.targets, config.lora.rank, on_gpu=True)
    if any(transformer.glob("*.safetensors*")):
        check_weights(transformer, wan)
    if config.lora.init and Path(config.lora.init).exists():
        wanted = wanted_of(wan, config.lora)
        read_start(Path(config.lora.init), wanted, config.model.expert)
    check_math(config.model.attention, config.activation_memory)
    samples = config.samples
    if not reads_datasets:
        samples = replace(samples, keys=[])
    if not Path(samples.prompts).exists():
        samples = replace(samples, prompts="")
    check_samples(samples, config.data, kind, laws_of(config, kind), wan.text_dim)


def check_datasets(config: TrainConfig, kind: ModelKind) -> Iterator[str]:
    """Are the datasets of this model? Yields what can't be compared. Raises ValueError."""
    vae_xxh3 = folder_xxh3(Path(config.model.path) / "vae")
    shapes = {Bucket.parse(config.samples.shape)} if config.samples.shape else set()
    for name in config.data.datasets:
        _, manifest = read_dataset(name)
        yield from check_identity(name, manifest, model=kind, vae_xxh3=vae_xxh3)
        shards = [shard for shards in manifest.splits.values() for shard in shards]
        shapes |= {Bucket.parse(shard.bucket) for shard in shards}
    check_shifts(config.flow, shapes)
