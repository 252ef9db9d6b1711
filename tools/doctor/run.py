"""Checks of one run: its dataset, its model folder, room on its disk."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from loader.manifest import (
    DatasetError,
    ShardInfo,
    decode_hashes,
    decode_index,
    read_manifest,
)
from loader.models import INDEX, TRANSFORMER_OF
from tools.doctor.finding import Finding
from tools.doctor.room import run_bytes
from train.config import TrainConfig

NUM_HASHED = 3  # samples read and hashed per split
WRITE_BYTES = 256 * 2**20
SLOW_DISK_MB_S = 100.0
# Parts of a diffusers folder beside the transformer that is trained, and what they are for.
PARTS = {
    "vae": 'samples, and data.condition = "raw"',
    "text_encoder": "prompts of one's own",
    "tokenizer": "prompts of one's own",
}
HUB_IDS = {
    48: "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    36: "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    16: "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
}
# by their number of blocks
WAN21_IDS = {30: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 40: "Wan-AI/Wan2.1-T2V-14B-Diffusers"}


def datasets(config: TrainConfig) -> Iterator[Finding]:
    """Each local dataset's manifest, that its files are there, and the hashes of a few samples."""
    for name in config.data.datasets:
        if "://" in name:
            yield Finding("dataset", "skipped", f"{name} is remote: the run checks it as it reads")
            continue
        yield _dataset(Path(name))


def _dataset(dataset: Path) -> Finding:
    try:
        manifest = read_manifest(dataset)
        num_samples = 0
        for split, shards in manifest.splits.items():
            for shard in shards:
                _check_files(dataset / split, shard)
                num_samples += shard.num_samples
            for shard in shards[:1]:
                _check_hashes(dataset / split / shard.name)
    except (DatasetError, OSError) as error:
        return Finding("dataset", "failure", str(error), f"shardgen verify {dataset}")
    counts = {split: len(shards) for split, shards in manifest.splits.items()}
    text = f"{dataset}: {num_samples:,} samples in {counts} shards, hashes of a few are right"
    return Finding("dataset", "ok", text)


def _check_files(folder: Path, shard: ShardInfo) -> None:
    for suffix in (".tar", ".idx", ".xxh3"):
        path = folder / f"{shard.name}{suffix}"
        if not path.exists():
            raise DatasetError(f"{path}: missing; copy the dataset again")
    tar = folder / f"{shard.name}.tar"
    if tar.stat().st_size != shard.bytes:
        raise DatasetError(f"{tar}: {tar.stat().st_size} bytes, the manifest says {shard.bytes}")


def _check_hashes(stem: Path) -> None:
    index_path, hash_path = stem.with_name(f"{stem.name}.idx"), stem.with_name(f"{stem.name}.xxh3")
    samples = decode_index(index_path.read_bytes(), str(index_path))
    hashes = decode_hashes(hash_path.read_bytes(), str(hash_path))
    with open(stem.with_name(f"{stem.name}.tar"), "rb") as file:
        for member in [member for sample in samples[:NUM_HASHED] for member in sample]:
            file.seek(member.offset)
            if xxhash.xxh3_64_hexdigest(file.read(member.size)) != hashes[member.name]:
                raise DatasetError(f"{stem}.tar: {member.name} does not match its hash")


def model_files(config: TrainConfig) -> Iterator[Finding]:
    """Which files of the diffusers folder are missing, and the command that fetches them."""
    folder = Path(config.model.path)
    expert, trained = config.model.expert, TRANSFORMER_OF[config.model.expert]
    hub_id = _hub_id(folder, has_experts=expert is not None)
    others = {"transformer", "transformer_2"} - {trained} if expert else set()
    index = folder / INDEX
    if not index.exists():
        # of TI2V-5B training can do without it
        yield Finding(
            "model index",
            "warning" if hub_id == HUB_IDS[48] else "failure",
            f"{index} is missing; it says whether there are two experts, and clips need it",
            f"hf download {hub_id} {INDEX} --local-dir {folder}",
        )
    parts = {trained: "training", **dict.fromkeys(others, "clips with both experts"), **PARTS}
    for part, purpose in parts.items():
        missing = missing_files(folder / part)
        required = part == trained or (part == "vae" and config.data.condition == "raw")
        fetch = f'hf download {hub_id} --include "{part}/*" --local-dir {folder}'
        yield Finding(
            f"model {part}",
            "ok" if not missing else "failure" if required else "warning",
            f"{folder / part} is complete"
            if not missing
            else f"{folder / part}: {', '.join(missing[:4])} missing; it is for {purpose}",
            fetch if missing else "",
        )


def _hub_id(folder: Path, has_experts: bool) -> str:
    """By the transformers that are there; of two experts one may be missing."""
    default = HUB_IDS[16 if has_experts else 48]
    files = [folder / name / "config.json" for name in ("transformer", "transformer_2")]
    try:
        config = json.loads(next((file for file in files if file.exists()), files[0]).read_text())
    except (OSError, ValueError):
        return default
    if config.get("in_channels") == 16 and not has_experts:
        return WAN21_IDS.get(config.get("num_layers"), WAN21_IDS[30])
    return HUB_IDS.get(config.get("in_channels"), default)


def missing_files(folder: Path) -> list[str]:
    """Names of files that a part of a diffusers folder lacks, by its own index where it has one."""
    if folder.name == "tokenizer":
        names = ("tokenizer.json", "spiece.model")
        return [] if any((folder / name).exists() for name in names) else [names[0]]
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        files = set(json.loads(indices[0].read_text())["weight_map"].values())
        return missing + sorted(name for name in files if not (folder / name).exists())
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return missing


def disk(config: TrainConfig) -> Iterator[Finding]:
    """Room and writing rate where the run will write. The file that measures it is removed."""
    output = Path(config.output)
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    path = existing / f".doctor-{os.getpid()}"
    block = os.urandom(16 * 2**20)
    start_s = time.perf_counter()
    try:
        with open(path, "wb") as file:
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    rate_mb_s = WRITE_BYTES / (time.perf_counter() - start_s) / 1e6
    needed_gib = run_bytes(config) / 2**30
    slow, full = rate_mb_s < SLOW_DISK_MB_S, free_gib < needed_gib
    advice = "choose another output: checkpoints wait for this disk" if slow else ""
    if full:
        advice = (
            'free some, validate less often, or set checkpoint.lora_dtype = "bfloat16": the LoRA '
            "files of every validated step stay"
        )
    yield Finding(
        "disk",
        "warning" if slow or full else "ok",
        f"{existing.resolve()}: {free_gib:.0f} GiB free, the run takes {needed_gib:.0f}; written "
        f"at {rate_mb_s:.0f} MB/s",
        advice,
    )
