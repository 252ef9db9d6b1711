"""The JSON file of a benchmark on a GPU: written anew after every round, so that a run that is cut
off loses nothing that was measured.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from loader.files import told, write_atomic


def check_start(program: str, path: Path | None) -> None:
    """Ends the program with one line where there is no GPU or no place for `path`: before time is
    spent on models.
    """
    if not torch.cuda.is_available():
        sys.exit(f"{program}: no GPU here, and what it measures runs on one")
    if path is not None and not path.parent.is_dir():
        sys.exit(f"{program}: {path.parent}: no such folder; make it first, or name another file")


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """What is measured so far; None: it is only printed. A file that can't be written ends nothing:
    the program goes on and prints.
    """
    if path is None:
        return
    try:
        write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    except OSError as error:
        print(f"{told(error)}; going on without", file=sys.stderr, flush=True)
