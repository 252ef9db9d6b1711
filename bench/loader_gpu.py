"""The loader on a GPU: `python -m bench.loader_gpu [--json PATH] [--only PART]`. Checks and
times, in four minutes.

feed    the tensors equal the CPU feed's bit for bit; samples/s against the limit (pread, zstd, one
        copy), in turns
frames  nvJPEG against Pillow, NVDEC against ffmpeg's frame and DALI's arithmetic, damaged files in
        a batch, FirstFrames through a VAE of the real size, and the raw feed's latents against
        those of one frame at a time, the GPU idle
wait    train/main.py at 832x480x9 on a random transformer of the real size: the share of a step
        spent waiting
raw     train/main.py at 1280x704x49 with 40% I2V, whose feeds take turns: latent, raw with
        KEY.jpg, raw with KEY.mp4. They hold the same samples in the same order, so that steps are
        compared in pairs

TQDM_DISABLE=1 keeps the progress bars out of the output. The clips need PyAV, which a machine
with a GPU may lack: run `python -m bench.loader_gpu --make-clips` elsewhere, and copy the folder
`clips` below `--folder`. A row with an aim says whether it is met; any that isn't makes the exit
code 1.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench.gpu_inputs import make_clips, write_inputs
from bench.gpu_rows import Row
from bench.loader_gpu_feed import check_feed
from bench.loader_gpu_train import check_raw, check_wait


def prepare(folder: Path) -> Iterator[Row]:
    start_s = time.perf_counter()
    write_inputs(folder)
    yield Row("datasets and weights written", time.perf_counter() - start_s, "s")


def check_frames(folder: Path) -> Iterator[Row]:
    """Imported when it is asked for: only this part needs DALI."""
    from bench import loader_gpu_frames

    return loader_gpu_frames.check_frames(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_loader_gpu"))
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--only", default="", help="feed, frames, wait or raw")
    parser.add_argument("--turns", type=int, default=20, help="steps of each kind in the part raw")
    parser.add_argument("--make-clips", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.make_clips:
        make_clips(folder / "clips")
        return
    parts: dict[str, Callable[[Path], Iterator[Row]]] = {
        "prepare": prepare,
        "feed": check_feed,
        "frames": check_frames,
        "wait": check_wait,
        "raw": partial(check_raw, num_turns=arguments.turns),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        if name != "prepare" and arguments.only not in name:
            continue
        start_s, num = time.perf_counter(), len(rows)
        try:
            for row in part(folder):
                rows.append(row)
                print(
                    f"{row.what}: {row.value:.4g} {row.unit}"
                    + (f" (aim: {row.aim}: {'met' if row.met else 'MISSED'})" if row.aim else ""),
                    flush=True,
                )
        except Exception as error:
            # the other parts' figures are worth having, and the exit code tells
            traceback.print_exc()
            rows.append(
                Row(
                    f"{name} failed after {len(rows) - num} rows: {error}", 0, "", "no error", False
                )
            )
        torch.cuda.empty_cache()  # the next part may be another process
        print(f"-- {name}: {time.perf_counter() - start_s:.1f} s", flush=True)
        if arguments.json:
            arguments.json.write_text(
                json.dumps(
                    {
                        "device": torch.cuda.get_device_name(),
                        "torch": torch.__version__,
                        "rows": [row._asdict() for row in rows],
                    },
                    indent=1,
                )
            )
    missed = [row.what for row in rows if row.met is False]
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
