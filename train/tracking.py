"""A run's numbers to Weights & Biases, where a line of the configuration asks for it:

    [wandb]
    project = "newsreel"

Numbers only: captions and pictures are the broadcaster's, so they stay here unless `media` says
otherwise, and so do paths, the console, the environment and the source. What is logged is never
read back: metrics.jsonl is the record of a run.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from loader.files import write_atomic

FOLDER, ID_FILE = "wandb", "run-id"


class WandbConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[wandb]` table."""

    # where the run appears; empty: nothing is sent anywhere
    project: str = ""
    # "offline": files under OUTPUT/wandb, for `wandb sync`
    mode: Literal["online", "offline"] = "online"
    # contact sheets of samples too
    media: bool = False


class Tracker:
    """One process of the run, the main one."""

    def __init__(self, run: Any, media: bool):
        self._run, self._media = run, media

    def log(self, values: Mapping[str, float], step: int) -> None:
        """A resumed run logs some steps again; wandb leaves those out, which are equal."""
        self._run.log(dict(values), step=step)

    def log_sheet(self, path: Path, step: int) -> None:
        """A picture, if pictures may be sent."""
        if self._media:
            import wandb

            self._run.log({"samples/sheet": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_tracker(config: WandbConfig) -> None:
    """Raises ValueError where wandb is asked for and not installed."""
    if not config.project:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"wandb.project = {config.project!r}: the package is missing ({error}); pip install "
            f'"newsreel[wandb]", or leave the line out'
        ) from error


def open_tracker(
    config: WandbConfig, output: Path, name: str, run_config: Mapping[str, object]
) -> Tracker | None:
    """None without a project. `run_config`: what of the configuration may be seen. Raises
    ValueError where wandb is not installed or can't start.
    """
    if not config.project:
        return None
    check_tracker(config)
    import wandb

    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # the same one when the run goes on
    id_file = folder / ID_FILE
    if not id_file.exists():
        write_atomic(id_file, uuid.uuid4().hex.encode())
    quiet = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    try:
        run = wandb.init(
            project=config.project,
            name=name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=config.mode,
            dir=str(output),
            config=dict(run_config),
            settings=quiet,
        )
    except (wandb.errors.Error, OSError) as error:
        raise ValueError(
            f"wandb.project = {config.project!r}: it can't start ({error}); log in by `wandb "
            f'login`, set wandb.mode = "offline", or leave the line out'
        ) from error
    return Tracker(run, config.media)
