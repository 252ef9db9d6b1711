"""Step checkpoints: written whole or not at all, and resumed exactly.

    OUTPUT/checkpoints/step-00000100/
        state.pt                  parameters, optimizer, loss scaler, feed, step, configuration
        lora.safetensors          diffusers keys
        lora_comfyui.safetensors  ComfyUI keys

A folder appears by rename after everything in it is on the disk, so what is there is complete.
All ranks hold the same state; rank 0 writes it, everyone reads it. A run that goes on from it
ends with the same bytes as one that was never stopped, on the same number of ranks (on another
number it sees the same samples, summed in another order), and on a GPU with `deterministic =
true` (without it, attention's backward pass rounds differently each time).
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loader.files import atomic_file, sync_folder

FOLDER = "checkpoints"
STATE_FILE = "state.pt"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint that this run can't go on from; the message names it, the difference and what
    to do.
    """


def save(
    output: Path, step: int, state: dict[str, Any], save_lora: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`. `save_lora(folder)`
    adds its files.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".tmp-*"):  # of a killed run
        shutil.rmtree(unfinished)

    # everything is on the disk before the folder gets its name
    temporary = folder / f".tmp-{step}"
    temporary.mkdir()
    with atomic_file(temporary / STATE_FILE) as file:
        torch.save(state, file)
    save_lora(temporary)
    sync_folder(temporary)
    target = folder / f"step-{step:08d}"
    os.replace(temporary, target)
    sync_folder(folder)

    for _, old in _all(output)[:-keep]:
        # a kill while it is deleted must not leave half of a checkpoint
        doomed = old.with_name(f".tmp-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return target


def latest(output: Path) -> Path | None:
    """The newest complete checkpoint in `output`, or None."""
    found = _all(output)
    return found[-1][1] if found else None


def load(
    folder: Path,
    config: dict[str, object],
    *,
    changeable: frozenset[str],
    defaults: dict[str, object],
) -> dict[str, Any]:
    """Read a checkpoint's state to the CPU.

    Raises CheckpointError if the configuration, as dotted keys, differs outside of `changeable`. A
    key that an older program did not have counts as its default.
    """
    state = read_state(folder)
    saved = defaults | state["config"]
    changed = [
        f"{key}: {saved.get(key)!r} then, {config.get(key)!r} now"
        for key in sorted(saved.keys() | config.keys())
        if key not in changeable and saved.get(key) != config.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{folder}: this run can't go on from it: {'; '.join(changed)}. Set these back, or "
            f"choose another output"
        )
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU. Raises CheckpointError if it can't be read."""
    try:
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True
        )
    except Exception as error:
        # torch raises many kinds for a damaged file; all of them mean the same to the user
        raise CheckpointError(
            f"{folder / STATE_FILE}: can't be read ({error}); delete this folder to go on from the "
            f"checkpoint before it"
        ) from error
    return state


def _all(output: Path) -> list[tuple[int, Path]]:
    names = [(_NAME.fullmatch(path.name), path) for path in (output / FOLDER).glob("step-*")]
    return sorted((int(match.group(1)), path) for match, path in names if match)
