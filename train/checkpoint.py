"""Step checkpoints: written whole or not at all, checked when they are read, resumed exactly.

    OUTPUT/checkpoints/step-00000100/
        state.pt                  parameters, optimizer, loss scaler, feed, step, configuration
        RUN-step-00000100.safetensors, RUN-step-00000100-comfyui.safetensors
        checkpoint.xxh3           a line per file: xxh3_128 of its bytes, two spaces, its name

A folder appears by rename after everything in it is on the disk, so what is there is complete, and
the hashes find what the disk has damaged since. All ranks hold the same state; rank 0 writes it,
everyone reads it. A run that goes on from it ends with the same bytes as one that was never
stopped, on the same number of ranks (on another number it sees the same samples, summed in another
order), and on a GPU with `deterministic = true` (without it, attention's backward pass rounds
differently each time).

The LoRA files are small and stay longer than state.pt: see `keep`.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta

from loader.files import atomic_file, file_xxh3, naming, sync_folder, write_atomic

FOLDER, STATE_FILE, HASH_FILE = "checkpoints", "state.pt", "checkpoint.xxh3"
_NAME = re.compile(r"step-(\d{8})")
# before the name of what is to be deleted
_ASIDE = ".tmp-"
_HASH_LINE = re.compile(r"([0-9a-f]{32})  ([^/\n]+)")
Positive = Annotated[int, Meta(ge=1)]


class CheckpointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[checkpoint]` table: how often a run is saved, and what of it stays."""

    # optimizer steps between checkpoints; the last step is one too
    every: Positive = 100
    # so many of the newest ones can be gone on from, and the best one by validation
    keep_newest: Positive = 3
    # the LoRA files of every step that this divides stay, those of validated steps anyway
    keep_every: Positive = 1000
    # of the LoRA files of a step
    lora_dtype: Literal["float32", "bfloat16"] = "float32"


class CheckpointError(ValueError):
    """A checkpoint that this run can't go on from; the message names it, the difference and what
    to do.
    """


class Retention(NamedTuple):
    """Which steps stay: `states` can be gone on from, of `loras` the LoRA files are there."""

    states: set[int]
    loras: set[int]


def keep(steps: Collection[int], newest: int, best: Iterable[int], every: int = 0) -> set[int]:
    """Those of `steps` that stay: the `newest` ones, the `best`, and multiples of `every` (0:
    none).
    """
    last = sorted(steps)[-newest:] if newest else []
    regular = [step for step in steps if every and step % every == 0]
    return set(steps) & {*last, *best, *regular}


def retain(
    steps: Collection[int],
    with_state: Collection[int],
    config: CheckpointConfig,
    best: Sequence[int],
    validated: Iterable[int],
) -> Retention:
    """What stays of the checkpoints of `steps`. with_state: those of them that can be gone on from;
    best: steps by validation, the best one first; validated: all steps that were validated.
    """
    # Of a run that went back to an older checkpoint there are LoRA files of later steps: counted
    # among the newest they would cost the state that was just written.
    states = keep(with_state, config.keep_newest, best[:1])
    return Retention(states, states | keep(steps, 0, [*best, *validated], config.keep_every))


def save(output: Path, step: int, state: dict[str, Any], save_lora: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `step`; `save_lora(folder)` adds its files. Raises OSError, naming a
    file, and then nothing of it stays.
    """
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".tmp-*"):  # of a killed run
        shutil.rmtree(unfinished)

    # everything is on the disk before the folder gets its name
    temporary = folder / f".tmp-{step}"
    temporary.mkdir()
    try:
        with atomic_file(temporary / STATE_FILE) as file:
            _write_state(state, file)
        save_lora(temporary)
        files = sorted(path for path in temporary.iterdir())
        lines = [f"{file_xxh3(path)}  {path.name}\n" for path in files]
        write_atomic(temporary / HASH_FILE, "".join(lines).encode())
        target = folder_of(output, step)
        # the one before its validation: deleted when the new one is there
        before = _aside(target) if target.exists() else None
        os.replace(temporary, target)
        if before is not None:
            shutil.rmtree(before)
    except BaseException:
        # what fills a disk is given back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    return target


def bring_back(output: Path) -> None:
    """Give those their names back that a killed run had put aside and neither replaced nor begun to
    delete. Before a run looks for what it can go on from.
    """
    for aside in (output / FOLDER).glob(f"{_ASIDE}step-*"):
        target = aside.with_name(aside.name.removeprefix(_ASIDE))
        is_whole = (aside / HASH_FILE).exists() and find_damage(aside) is None
        if is_whole and not target.exists():
            aside.rename(target)


def prune(output: Path, retention: Retention) -> None:
    """Delete what does not stay."""
    for step, folder in _all(output):
        if step in retention.states:
            continue
        if step not in retention.loras:
            shutil.rmtree(_aside(folder))
        elif (folder / STATE_FILE).exists():
            (folder / STATE_FILE).unlink()


def steps(output: Path) -> list[int]:
    """The steps of which something is there, ascending."""
    return [step for step, _ in _all(output)]


def latest(output: Path) -> Path | None:
    """The newest checkpoint in `output` with a state, or None."""
    found = [folder for _, folder in _all(output) if (folder / STATE_FILE).exists()]
    return found[-1] if found else None


def step_of(folder: Path) -> int:
    """The number of finished steps at a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def steps_with_state(output: Path) -> list[int]:
    """Those of `steps` that can be gone on from."""
    return [step for step, folder in _all(output) if (folder / STATE_FILE).exists()]


class Intact(NamedTuple):
    """The newest checkpoint whose files have their hashes, None without any; and what is wrong
    with newer ones.
    """

    folder: Path | None
    damaged: list[str]


def latest_intact(output: Path) -> Intact:
    """Look for the newest checkpoint that can be gone on from. Raises CheckpointError where all
    of them are damaged.
    """
    damaged: list[str] = []
    for _, folder in reversed(_all(output)):
        if not (folder / STATE_FILE).exists():
            continue
        fault = find_damage(folder)
        if fault is None:
            return Intact(folder, damaged)
        damaged.append(f"{folder}: {fault}")
    if damaged:
        raise CheckpointError(
            f"{'; '.join(damaged)}. No other checkpoint is there: bring one back from a backup, or "
            f"choose another output"
        )
    return Intact(None, [])


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. One of a version without hashes is only
    tried when it is loaded. Raises OSError, but not for what the disk can't read any more.
    """
    try:
        return _find_damage(folder)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{Path(error.filename or folder).name} can't be read ({error.strerror})"


def _find_damage(folder: Path) -> str | None:
    if not (folder / HASH_FILE).exists():
        try:
            read_state(folder)
        except CheckpointError as error:
            return str(error)
        return None
    try:
        *lines, rest = (folder / HASH_FILE).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        return f"{HASH_FILE} is damaged"
    matches = [_HASH_LINE.fullmatch(line) for line in lines]
    if rest or not all(matches):
        return f"{HASH_FILE} is damaged"
    expected = {match[2]: match[1] for match in matches if match}
    # what a file manager or a storage puts there is none of ours
    ours = [folder / STATE_FILE, *folder.glob("*.safetensors")]
    found = {path.name for path in ours if path.exists()}
    if found ^ expected.keys():
        return f"{HASH_FILE} and the files there differ: {sorted(found ^ expected.keys())}"
    for name, xxh3 in expected.items():
        with naming(folder / name):
            actual = file_xxh3(folder / name)
        if actual != xxh3:
            return f"{name} is damaged: its bytes are not those that were written"
    return None


def set_aside_after(output: Path, step: int) -> None:
    """Rename checkpoints past `step`, which are damaged, so that the run can write them again."""
    for later, folder in _all(output):
        if later > step and (folder / STATE_FILE).exists():
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def check_config(
    folder: Path,
    saved_config: dict[str, object],
    config: dict[str, object],
    *,
    changeable: frozenset[str],
    defaults: dict[str, object],
) -> None:
    """Can a run with this configuration go on from the checkpoint in `folder`, whose own was
    `saved_config`? Both as dotted keys.

    Raises CheckpointError if they differ outside of `changeable`. A key that an older program did
    not have counts as its default.
    """
    saved = defaults | saved_config
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


def _write_state(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # when a write fails torch goes on to close its archive, and fails at that instead
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state on the CPU. Raises CheckpointError if it can't be read."""
    try:
        state: dict[str, Any] = torch.load(
            folder / STATE_FILE, map_location="cpu", weights_only=True
        )
    except Exception as error:
        # torch raises many kinds for a damaged file; all of them mean the same to the user
        raise CheckpointError(f"{STATE_FILE} can't be read ({error})") from error
    if not isinstance(state, dict) or not {"step", "config"} <= state.keys():
        raise CheckpointError(f"{STATE_FILE} is not the state of a run")
    return state


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, if it is there."""
    return output / FOLDER / f"step-{step:08d}"


def _aside(folder: Path) -> Path:
    # a kill while it is deleted must not leave half of a checkpoint
    doomed = folder.with_name(f"{_ASIDE}{folder.name}")
    folder.rename(doomed)
    return doomed


def _all(output: Path) -> list[tuple[int, Path]]:
    names = [(_NAME.fullmatch(path.name), path) for path in (output / FOLDER).glob("step-*")]
    return sorted((int(match.group(1)), path) for match, path in names if match)
