"""The loader on a GPU: `python -m bench.loader_gpu [--json PATH] [--only PART]`. Checks and
times, in four minutes.

feed    the tensors equal the CPU feed's bit for bit; samples/s against the limit (pread, zstd, one copy), in turns
frames  nvJPEG against Pillow, NVDEC against ffmpeg's frame and DALI's arithmetic, damaged files in a batch, FirstFrames
        through a VAE of the real size, and the raw feed's latents against those of one frame at a
        time, the GPU idle
wait    train/main.py at 832x480x9 on a random transformer of the real size: the share of a step spent waiting
raw     train/main.py at 1280x704x49 with 40% I2V, whose feeds take turns: latent, raw with KEY.jpg, raw with KEY.mp4.
        They hold the same samples in the same order, so that steps are compared in pairs

TQDM_DISABLE=1 keeps the progress bars out of the output. The clips need PyAV, which a machine
with a GPU may lack: run `python -m bench.loader_gpu --make-clips` elsewhere, and copy the folder
`clips` below `--folder`. A row with an aim says whether it is met; any that isn't makes the exit
code 1.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import PIL.Image
import torch
from torch import Tensor

from bench.gpu_inputs import LARGE, NUM_CLIPS, SMALL, dali_frame, make_clips, write_inputs
from bench.loader import CPU, feed_samples, limit_samples
from loader.config import load_toml
from loader.feed import Batch, Feed
from loader.vae.encoder import VAEEncoder, load_vae_encoder
from tools.fake.batch import synthetic_jpeg
from train.config import TrainConfig

if TYPE_CHECKING:
    from loader.dali import Container, FirstFrames

DEVICE = torch.device("cuda", 0)
ROUNDS, WARM_UP = 5, 10
RUN = """
output = "{folder}/run-{name}"
num_steps = {steps}
global_batch = 1
checkpoint_every = {steps}
[model]
path = "{folder}/model"
dtype = "bfloat16"
[data]
datasets = ["{folder}/{dataset}"]
condition = "{condition}"
"""


class Row(NamedTuple):
    what: str
    value: float
    unit: str
    aim: str = ""
    met: bool | None = None


def at_most(what: str, value: float, unit: str, limit: float) -> Row:
    return Row(what, value, unit, f"at most {limit:g}", value <= limit)


def prepare(folder: Path) -> Iterator[Row]:
    start_s = time.perf_counter()
    write_inputs(folder)
    yield Row("datasets and weights written", time.perf_counter() - start_s, "s")


def make_feed(dataset: Path, device: torch.device, **changes: Any) -> Feed:
    arguments: dict[str, Any] = dict(
        split="train",
        global_batch=2,
        micro_batch=2,
        rank=0,
        world_size=1,
        seed=0,
        i2v_share=0.4,
        caption_dropout=0.2,
        condition="latent",
        device=device,
    )
    return Feed([dataset], **(arguments | changes))


def check_feed(folder: Path) -> Iterator[Row]:
    for name in ("jpg", "small"):
        differing = 0
        with (
            make_feed(folder / name, CPU) as on_cpu,
            make_feed(folder / name, DEVICE, num_threads=4) as on_gpu,
        ):
            for _ in range(24):
                (a, _), (b, _) = next(on_cpu), next(on_gpu)
                differing += not (
                    a.keys == b.keys
                    and torch.equal(a.latent_BCTHW, b.latent_BCTHW.cpu())
                    and torch.equal(a.text_BSD, b.text_BSD.cpu())
                )
        yield at_most(f"{name}: batches of 24 that differ from the CPU's", differing, "", 0)
    subjects = [(kind, threads) for threads in (2, 4) for kind in (feed_samples, limit_samples)]
    rates: dict[Any, list[float]] = {subject: [] for subject in subjects}
    for _ in range(ROUNDS):
        for kind, threads in subjects:
            rates[kind, threads].append(_rate(kind(str(folder / "jpg"), threads, DEVICE, 8)))
    for kind, threads in subjects:
        runs = rates[kind, threads]
        yield Row(
            f"{kind.__name__}, {threads} threads (least {min(runs):.0f}, most {max(runs):.0f}, n = {ROUNDS})",
            statistics.median(runs),
            "samples/s",
        )
    for threads in (2, 4):
        share = statistics.median(rates[feed_samples, threads]) / statistics.median(
            rates[limit_samples, threads]
        )
        yield Row(
            f"share of the limit, {threads} threads", share, "", "at least 0.85", share >= 0.85
        )


def _rate(samples: Iterator[Any]) -> float:
    """Samples a second up to the last: closing is no work of theirs (jobs begun beyond it,
    buffers to free).
    """
    for _ in range(WARM_UP):
        next(samples)
    torch.cuda.synchronize()
    start_s, times_s = time.perf_counter(), [time.perf_counter() for _ in samples]
    return len(times_s) / (times_s[-1] - start_s)


def check_frames(folder: Path) -> Iterator[Row]:
    vae = load_vae_encoder(folder / "model", DEVICE, torch.bfloat16)
    jpegs = [synthetic_jpeg(np.random.default_rng(i), LARGE) for i in range(NUM_CLIPS)]
    yield from _check_kind(
        "jpg", jpegs, [_pixels(io.BytesIO(file)) for file in jpegs], (0.5, 4), vae, folder
    )
    names = [f"{folder / 'clips'}/{i}" for i in range(NUM_CLIPS)]
    clips = [Path(f"{name}.mp4").read_bytes() for name in names]
    references = [_pixels(Path(f"{name}-709.png")) for name in names]
    yield from _check_kind("mp4", clips, references, (1, None), vae, folder)
    yield from _check_colours(clips, references, [Path(f"{name}-planes.png") for name in names])
    other = _errors(references, [_pixels(Path(f"{name}-601.png")) for name in names]).flatten()
    yield Row(
        "mp4: mean error that BT.601 instead of BT.709 would make", other.mean().item(), "levels"
    )


def _errors(frames: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """[N, 3, 1, H, W] in levels."""
    return torch.stack(
        [(a.cpu() - b).abs() * 127.5 for a, b in zip(frames, references, strict=True)]
    )


def _tail(errors: Tensor) -> float:
    return errors.flatten()[::97].quantile(0.999).item()


def _check_colours(
    clips: list[bytes], references: list[Tensor], planes: list[Path]
) -> Iterator[Row]:
    """Of the same planes, which H.264 leaves no choice, DALI's arithmetic differs in ties of
    rounding alone.
    """
    from loader.dali import FrameDecoder

    decoder = FrameDecoder("mp4", DEVICE, torch.float32, max_batch=len(clips))
    frames = [frame for frame in decoder.decode(clips) if isinstance(frame, Tensor)]
    expected, held = zip(*map(dali_frame, planes), strict=True)
    errors, held_N1HW = _errors(frames, expected), torch.stack(held)
    inner = errors[..., 1:-1, 1:-1]  # for the outermost pixels DALI reads past the planes
    yield at_most(
        "mp4: mean error against DALI's arithmetic, without the edge",
        inner.mean().item(),
        "levels",
        0.05,
    )
    # one of its levels, mended: 1.0864
    yield at_most("mp4: 99.9% of those errors", _tail(inner), "levels", 1.1)
    edge = (errors.sum() - inner.sum()) / (errors.numel() - inner.numel())
    yield Row("mp4: mean error against it at the edge", edge.item(), "levels")
    yield Row(
        "mp4: pixels that 8-bit BT.601 can't hold",
        100 * (1 - held_N1HW.double().mean().item()),
        "%",
    )
    inner = _errors(frames, references).movedim(1, -1)[..., 1:-1, 1:-1, :][
        held_N1HW[..., 1:-1, 1:-1]
    ]
    yield at_most(
        "mp4: 99.9% of errors against ffmpeg in the others, without the edge",
        _tail(inner),
        "levels",
        3,
    )


def _check_kind(
    kind: "Container",
    files: list[bytes],
    references: list[Tensor],
    limits: tuple[float, float | None],
    vae: VAEEncoder,
    folder: Path,
) -> Iterator[Row]:
    from loader.dali import DecodeError, FirstFrames, FrameDecoder

    decoder = FrameDecoder(kind, DEVICE, torch.float32, max_batch=len(files))
    frames = [frame for frame in decoder.decode(files) if isinstance(frame, Tensor)]
    yield Row(
        f"{kind}: files of {len(files)} decoded", len(frames), "", "all", len(frames) == len(files)
    )
    errors = _errors(frames, references)
    yield at_most(f"{kind}: mean error", errors.mean().item(), "levels", limits[0])
    tail = (f"{kind}: 99.9% of errors", _tail(errors), "levels")
    yield at_most(*tail, limits[1]) if limits[1] else Row(*tail)

    first, half, text, last = decoder.decode(
        [files[0], files[1][: len(files[1]) // 2], b"neither", files[2]]
    )
    for name, result in (("half a file", half), ("text", text)):
        print(f"{kind}: {name}: {result if isinstance(result, DecodeError) else 'decoded'}")
    yield Row(f"{kind}: text is refused", 1, "", "1", isinstance(text, DecodeError))
    assert isinstance(first, Tensor) and isinstance(last, Tensor), (first, last)
    error = _errors([first, last], [frames[0].cpu(), frames[2].cpu()]).max().item()
    yield at_most(
        f"{kind}: intact frames beside damaged ones against before, most", error, "levels", 1
    )

    first_frames, seconds = FirstFrames(vae, DEVICE), []
    for file in files * 3:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        latent = first_frames.encode(kind, file, LARGE)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    assert isinstance(latent, Tensor), latent
    expected = vae.encode(references[-1].to(DEVICE).unsqueeze(0))[0].float()
    error = ((latent.float() - expected).norm() / expected.norm()).item()
    yield at_most(f"{kind}: latent against the reference frame's, relative L2", error, "", 0.05)
    yield Row(
        f"{kind}: a file to its latent, median of {len(seconds[3:])}",
        1e3 * statistics.median(seconds[3:]),
        "ms",
    )
    yield at_most(
        f"{kind}: raw feed against one frame at a time, largest difference",
        _raw_feed_difference(folder / kind, kind, vae, first_frames),
        "",
        0,
    )


def _raw_feed_difference(
    dataset: Path, kind: "Container", vae: VAEEncoder, first_frames: "FirstFrames"
) -> float:
    """Four threads beside a busy stream must give what one frame at a time gives on an idle GPU."""
    seen: dict[str, Tensor] = {}
    with make_feed(
        dataset, DEVICE, condition="raw", vae=vae, i2v_share=1.0, num_threads=4, max_ahead=8
    ) as feed:
        for _ in range(16):
            batch, _ = next(feed)
            assert batch.condition_BC1HW is not None
            batch.latent_BCTHW.float().square_().sum()  # the trainer's stream has work too
            seen |= zip(batch.keys, batch.condition_BC1HW.clone(), strict=True)
        torch.cuda.synchronize()
        assert not feed.damages, feed.damages
        reader, worst = feed._readers[0], 0.0
        for shard, info in enumerate(reader._shards):
            for position in range(info.num_samples):
                sample = reader.read(shard, position, lambda extensions: [kind])
                if sample.meta.key in seen:
                    latent = first_frames.encode(kind, bytes(sample.members[kind]), LARGE)
                    torch.cuda.synchronize()
                    assert isinstance(latent, Tensor), latent
                    worst = max(
                        worst, (latent.half() - seen.pop(sample.meta.key)).abs().max().item()
                    )
    assert not seen
    return worst


def _pixels(file: Path | io.BytesIO) -> Tensor:
    """[3, 1, H, W] in [-1, 1], by Pillow."""
    with PIL.Image.open(file) as picture:
        return (
            torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).unsqueeze(1) / 127.5
            - 1
        )


def write_run(folder: Path, name: str, dataset: str, condition: str, steps: int) -> Path:
    # a run would go on from its checkpoint
    shutil.rmtree(folder / f"run-{name}", ignore_errors=True)
    path = folder / f"{name}.toml"
    path.write_text(
        RUN.format(folder=folder, name=name, dataset=dataset, condition=condition, steps=steps)
    )
    return path


def read_metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"run-{name}" / "metrics.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


def check_wait(folder: Path) -> Iterator[Row]:
    config = write_run(folder, "wait", "small", "latent", 150)
    subprocess.run([sys.executable, "train/main.py", str(config)], check=True)
    steps = [step for step in read_metrics(folder, "wait") if step["step"] > 20]
    step_s, wait_s = (
        statistics.fmean(step[key] for step in steps) for key in ("s_per_step", "data_wait_s")
    )
    yield Row(f"{SMALL}: mean step of {len(steps)}", 1e3 * step_s, "ms")
    yield at_most(f"{SMALL}: data wait in the step", 100 * wait_s / step_s, "%", 0.5)


class Turns:
    """Stands in for train.setup's Feed: the batches of several feeds in turn, and a record of
    whose each was.
    """

    def __init__(self, feeds: dict[str, Feed]):
        self._feeds, self._next = feeds, 0
        self.record: list[tuple[str, str, bool]] = []

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        turn, place = divmod(self._next, len(self._feeds))
        # each is first, second and last equally often
        name = list(self._feeds)[(turn + place) % len(self._feeds)]
        self._next += 1
        batch, state = next(self._feeds[name])
        self.record.append((name, batch.keys[0], batch.is_i2v[0]))
        return batch, state

    def __getattr__(self, name: str) -> Any:
        return getattr(next(iter(self._feeds.values())), name)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *error: object) -> None:
        for feed in self._feeds.values():
            feed.close()


def check_raw(folder: Path, num_turns: int) -> Iterator[Row]:
    from train import main, setup
    from train.parallel import mesh

    runs = {"latent": ("jpg", "latent"), "raw, jpg": ("jpg", "raw"), "raw, mp4": ("mp4", "raw")}
    config = write_run(folder, "raw", "jpg", "raw", (num_turns + 2) * len(runs))
    turns: list[Turns] = []

    def make(datasets: list[str], **arguments: Any) -> Turns:
        turns.append(
            Turns(
                {
                    name: Feed([folder / dataset], **(arguments | {"condition": condition}))
                    for name, (dataset, condition) in runs.items()
                }
            )
        )
        return turns[0]

    setattr(setup, "Feed", make)  # noqa: B010  the loop stays the trainer's own
    with ExitStack() as stack:
        main.train(
            load_toml(config, TrainConfig, []), stack.enter_context(mesh.process_group()), stack
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    waits: dict[str, list[float]] = {name: [] for name in runs}
    steps = list(zip(turns[0].record, read_metrics(folder, "raw"), strict=True))[2 * len(runs) :]
    for (name, *_), step in steps:
        seconds[name].append(step["s_per_step"])
        waits[name].append(step["data_wait_s"])
    samples = [
        {(key, is_i2v) for (_, key, is_i2v), _ in steps[i : i + 3]} for i in range(0, len(steps), 3)
    ]
    assert all(len(turn) == 1 for turn in samples), "the feeds don't hold the same samples"
    i2v = [is_i2v for ((_, is_i2v),) in samples]
    yield Row(f"{LARGE}: I2V samples of {num_turns}", sum(i2v), "")
    base = seconds["latent"]
    for name, times in seconds.items():
        yield Row(
            f"{LARGE}: {name}: median step (least {min(times):.3f}, most {max(times):.3f}, n = {len(times)})",
            statistics.median(times),
            "s",
        )
        yield Row(
            f"{LARGE}: {name}: data wait in the step", 100 * sum(waits[name]) / sum(times), "%"
        )
    for name, times in list(seconds.items())[1:]:
        for what, middle in (("median", statistics.median), ("mean", statistics.fmean)):
            yield at_most(
                f"{LARGE}: {name}: {what} step over latent's",
                100 * (middle(times) / middle(base) - 1),
                "%",
                2,
            )
        pairs = [1e3 * (a - b) for a, b in zip(times, base, strict=True)]
        yield Row(
            f"{LARGE}: {name}: median of the paired differences", statistics.median(pairs), "ms"
        )


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
        except (
            Exception
        ) as error:  # the other parts' figures are worth having, and the exit code tells
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
