"""Decode, resample, scale and letterbox, against the ffmpeg program: `python -m bench.media
[--shape 1280x704x49]`.

Clips like the users' (720x480, SAR 32:27, 29.97 fps, H.264) are made here. Both sides take one
window of each clip from the same second on: frames at 24 fps, one lanczos resize with the same
swscale flags, black bars, RGB. ffmpeg writes the raw frames to a pipe that is read and thrown
away, because that is what a program that wants them would do. One thread for each on one core, in
turn, so that both see the same machine. The claim is a ratio: ours must be at least 0.9.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from loader.shape import WAN22, Bucket
from shardgen.media.decode import decode_window
from shardgen.media.geometry import Orientation, fit

SAR, NTSC, START_MS = Fraction(32, 27), Fraction(30000, 1001), 1000


def write_clip(path: Path, seed: int, num_frames: int) -> None:
    """A moving, grainy picture: what a camera gives is neither flat nor still."""
    rng = np.random.default_rng(seed)
    scene = rng.integers(30, 220, (12, 18, 3)).repeat(60, 0).repeat(60, 1).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=NTSC, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width, stream.height, stream.pix_fmt = 720, 480, "yuv420p"
        stream.codec_context.sample_aspect_ratio = SAR
        for i in range(num_frames):
            picture = scene[3 * i % 200 : 3 * i % 200 + 480, 4 * i % 300 : 4 * i % 300 + 720]
            grain = rng.normal(0, 4, picture.shape).astype(np.int16)
            frame = av.VideoFrame.from_ndarray(
                (picture + grain).clip(0, 255).astype(np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def ours(paths: list[Path], bucket: Bucket) -> None:
    for path in paths:
        assert len(decode_window(path, START_MS, 24.0, bucket)) == bucket.num_frames


def ffmpeg(paths: list[Path], bucket: Bucket) -> None:
    place = fit(720, 480, SAR, Orientation(), bucket, "letterbox")
    chain = (
        f"trim=start={START_MS / 1000},setpts=PTS-STARTPTS,fps=24:round=down,"
        f"scale={place.width_px}:{place.height_px}:flags=lanczos+full_chroma_int+full_chroma_inp+accurate_rnd+"
        f"bitexact:in_color_matrix=bt601:in_range=tv:out_range=pc,format=rgb24,"
        f"pad={bucket.width_px}:{bucket.height_px}:{place.x_px}:{place.y_px}"
    )
    for path in paths:
        command = [
            "ffmpeg",
            "-v",
            "error",
            "-nostdin",
            "-threads",
            "1",
            "-i",
            str(path),
            "-an",
            "-vf",
            chain,
            "-filter_threads",
            "1",
            "-frames:v",
            str(bucket.num_frames),
            "-f",
            "rawvideo",
            "-",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            num_bytes = sum(len(data) for data in iter(lambda: process.stdout.read(1 << 20), b""))  # type: ignore
        assert num_bytes == bucket.num_frames * bucket.height_px * bucket.width_px * 3


def timed(work: Callable[[list[Path], Bucket], None], paths: list[Path], bucket: Bucket) -> float:
    start = time.perf_counter()
    work(paths, bucket)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Windows per second, ours against the ffmpeg program."
    )
    parser.add_argument("--shape", default="1280x704x49")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bucket = WAN22.parse(options.shape)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for ffmpeg too
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.mp4" for seed in range(options.clips)]
        for seed, path in enumerate(paths):
            write_clip(path, seed, int((START_MS / 1000 + bucket.num_frames / 24 + 1) * NTSC))
        seconds: dict[str, list[float]] = {"ours": [], "ffmpeg": []}
        for _ in range(options.rounds):
            seconds["ours"].append(timed(ours, paths, bucket))
            seconds["ffmpeg"].append(timed(ffmpeg, paths, bucket))
    print(
        f"{options.clips} windows of {bucket} from 720x480, one core, {options.rounds} interleaved "
        f"rounds; median (least to most)"
    )
    for name, taken in seconds.items():
        frames = sorted(options.clips * bucket.num_frames / each for each in taken)
        median = statistics.median(frames)
        print(f"  {name:<7} {median:7.1f} frames/s ({frames[0]:.1f} to {frames[-1]:.1f})")
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["ffmpeg"], strict=True))
    print(f"  ours / ffmpeg {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True).stdout
    print(version.splitlines()[0])


if __name__ == "__main__":
    main()
