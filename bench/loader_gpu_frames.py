"""The part `frames` of bench.loader_gpu: first frames and their latents against references."""

import io
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from bench.gpu_inputs import LARGE, NUM_CLIPS, dali_frame
from bench.gpu_rows import DEVICE, Row, at_most
from bench.loader_gpu_feed import pair_feed
from loader.dali import Container, DecodeError, FirstFrames, FrameDecoder
from loader.vae.encoder import VAEEncoder, load_vae_encoder
from tools.fake.batch import synthetic_jpeg


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
    kind: Container,
    files: list[bytes],
    references: list[Tensor],
    limits: tuple[float, float | None],
    vae: VAEEncoder,
    folder: Path,
) -> Iterator[Row]:
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
    dataset: Path, kind: Container, vae: VAEEncoder, first_frames: FirstFrames
) -> float:
    """Four threads beside a busy stream must give what one frame at a time gives on an idle GPU."""
    seen: dict[str, Tensor] = {}
    with pair_feed(
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
