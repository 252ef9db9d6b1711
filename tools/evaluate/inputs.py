"""What clips are made of, checked before hours go into them: model, datasets, every LoRA."""

from pathlib import Path

from loader.identity import check_identity, folder_xxh3
from loader.models import read_kind
from loader.shape import Bucket
from loader.store import read_dataset
from tools.applied import check_lora
from tools.evaluate.config import EvaluateConfig
from train.lora.config import LoRAConfig, format_blocks
from train.lora.formats import read_lora
from train.lora.start import read_start, wanted_of
from train.model.load import CONFIG, check_weights, read_config


def check_inputs(config: EvaluateConfig) -> tuple[dict[str, int], list[str]]:
    """(candidate -> the number of its LoRA's tensors, lines of what could not be compared).

    Raises ValueError: for datasets of another model (DatasetError), weights that don't fit their
    configuration, a LoRA of another model (LoRAError) or without effect (NotAppliedError).
    """
    model = Path(config.model)
    kind, vae_xxh3 = read_kind(model), folder_xxh3(model / "vae")
    lines: list[str] = []
    shapes: set[Bucket] = set()
    for name in config.datasets:
        _, manifest = read_dataset(name)
        lines += check_identity(name, manifest, model=kind, vae_xxh3=vae_xxh3)
        shapes |= {Bucket.parse(shard.bucket) for shard in manifest.splits.get("val", [])}
    lines += [
        f"sampling.shifts: {shape} is no shape of the val split, so it changes nothing"
        for shape in sorted(config.sampling.shifts.keys() - set(map(str, shapes)))
    ]
    wan = read_config(model / "transformer" / CONFIG)
    check_weights(model / "transformer", wan)
    num_tensors = {}
    for name, file in config.candidates.items():
        path = Path(file)
        num_tensors[name] = check_lora(path)
        read_start(path, wanted_of(wan, adapters_in(path, wan.num_layers)))
    return num_tensors, lines


def adapters_in(path: Path, num_layers: int) -> LoRAConfig:
    """Adapters of exactly what a LoRA file holds, of the blocks that a model of `num_layers` has.
    Raises LoRAError.
    """
    found = read_lora(path)
    places = [name.split(".", 2) for name in found]
    blocks = {int(block) for _, block, _ in places}
    rank = max(len(adapter.a_RK) for adapter in found.values())
    return LoRAConfig(
        targets=sorted({target for _, _, target in places}),
        blocks=format_blocks(blocks & set(range(num_layers))),
        rank=rank,
        alpha=float(rank),
    )
