"""What a run tells about itself: OUTPUT/metrics.jsonl, TensorBoard beside it, and the progress bar of rank 0.

Only measured values are written. A resumed run first drops the lines past its checkpoint, which a killed run may have
left, so that the file always reads as one run.
"""

import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
Record = dict[str, float | int | None]


class Metrics:
    """Writes one record per logged step; only rank 0 has one."""

    def __init__(self, output: Path, first_step: int, num_steps: int):
        output.mkdir(parents=True, exist_ok=True)
        path = output / METRICS_FILE
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True)
                    if line.endswith(b"\n") and msgspec.json.decode(line)["step"] <= first_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        self._file = open(path, "ab")  # closed in __exit__
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, desc="train", unit="step", dynamic_ncols=True)

    def write(self, record: Record) -> None:
        """`record["step"]` counts finished steps; None means not measured (memory on a machine that can't tell)."""
        step = int(record["step"] or 0)
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tok/s, "
                                  f"data wait {record['data_wait_share']:.1%}")

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.close()
        self._writer.close()
        self._file.close()


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the CUDA allocator on a GPU, of the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
