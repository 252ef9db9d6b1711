"""Which weights a model folder holds, told without reading them all.

A LoRA means something only on the base that it was trained on, and base models of one shape look
alike. So a checkpoint carries this identity of its base, and a run that goes on from it compares.
It finds another model, not a flipped bit: of each tensor a few blocks are read.
"""

import os
from pathlib import Path

import msgspec
import xxhash

from train.model.load import CONFIG, WeightsError, tensor_files

BLOCK_BYTES = 4096
# at the start, in the middle and at the end of each tensor
NUM_BLOCKS = 3


class _Entry(msgspec.Struct):
    """Of a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def weights_xxh3(model_dir: Path, subfolder: str = "transformer") -> str:
    """xxh3_128 hex of the transformer in `model_dir`/`subfolder`: its config.json, and of each
    tensor its name, dtype, shape and sampled blocks, however they are spread over files. Raises
    WeightsError, OSError.
    """
    folder = model_dir / subfolder
    names_of_file: dict[str, list[str]] = {}
    for name, file in tensor_files(folder).items():
        names_of_file.setdefault(file, []).append(name)
    blocks: dict[str, bytes] = {}
    for file, names in names_of_file.items():
        blocks |= _sampled(folder / file, names)

    digest = xxhash.xxh3_128((folder / CONFIG).read_bytes())
    for name in sorted(blocks):
        digest.update(name.encode() + b"\0" + blocks[name])
    return digest.hexdigest()


def _sampled(path: Path, names: list[str]) -> dict[str, bytes]:
    """Of each tensor in a safetensors file: dtype, shape, blocks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = msgspec.json.decode(
            os.pread(descriptor, header_bytes, 8), type=dict[str, msgspec.Raw]
        )
        found = {}
        for name in names:
            entry = msgspec.json.decode(header[name], type=_Entry)
            begin, end = (8 + header_bytes + offset for offset in entry.data_offsets)
            last = max(end - BLOCK_BYTES, begin)
            places = [begin + (last - begin) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
            data = [os.pread(descriptor, min(BLOCK_BYTES, end - at), at) for at in places]
            found[name] = b"".join([f"{entry.dtype} {entry.shape}".encode(), *data])
        return found
    except (KeyError, msgspec.MsgspecError, OverflowError) as error:
        raise WeightsError(f"{path}: no safetensors header ({error}); download it again") from error
    finally:
        os.close(descriptor)
