"""Made-up runs, samples and evaluations, for tests of what shows them: `write_run(folder)`.

The curves are formulas and the clips coloured squares; nothing was trained. The files are those of
a real run, written through the structs that the dashboard reads them with.
"""

import math
import random
from pathlib import Path

import av
import msgspec
import numpy as np

from shardgen.report.progress import BuildRecord, append_record
from tools.dashboard.records import RunStatus, SampleClip, SampleSet, ValidationLine
from tools.evaluate.result import Comparison, Metric, Result, ResultClip, Variant

PROMPTS = (
    ("자연/풍경", "커다란 토끼가 풀밭에 서서 기지개를 켠다."),
    ("생활/문화", "헬멧을 쓴 남자가 자전거를 타고 거리를 지나간다."),
)
_FPS, _NUM_FRAMES, _WIDTH_PX, _HEIGHT_PX = 24, 17, 160, 96


def write_run(folder: Path, *, num_steps: int = 1000, step: int = 600, lr: float = 1e-4) -> None:
    """A run of `num_steps` that has come to `step`, validated every 100, without samples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f"num_steps = {num_steps}\nglobal_batch = 8\n[optim]\nlr = {lr}\n[lora]\nrank = 16\n"
    )
    rng = random.Random(0)
    with (folder / "metrics.jsonl").open("wb") as file:
        for each in range(1, step + 1):
            s_per_step, wait_s = 1.5 + 0.1 * rng.random(), 0.02 + 0.01 * rng.random()
            record = {
                "step": each,
                "epoch": each // 200,
                "loss": 0.3 + 0.2 * math.exp(-each / 200) + 0.05 * rng.gauss(0, 1),
                "lr": lr * min(1.0, each / 50),
                "grad_norm": 0.5 + 0.3 * rng.random(),
                "loss_scale": 65536.0,
                "s_per_step": s_per_step,
                "data_wait_s": wait_s,
                "forward_s": 0.3 * s_per_step,
                "backward_s": 0.6 * s_per_step,
                "optimizer_s": 0.08,
                "tokens_per_s": 11440 / s_per_step,
                "data_wait_share": wait_s / s_per_step,
                "memory_gib": 28.1,
            }
            file.write(msgspec.json.encode(record) + b"\n")
    with (folder / "validation.jsonl").open("wb") as file:
        for each in range(0, step + 1, 100):
            relative = 1 - 0.18 * (1e-4 / lr) ** 0.3 * (1 - math.exp(-each / 250))
            line = ValidationLine(
                step=each,
                relative=relative,
                by_level=[relative + 0.01 * level for level in range(4)],
                per_task={"t2v": relative + 0.004, "i2v": relative - 0.005},
                per_category={name: relative for name, _ in PROMPTS},
                psnr_by_level_db=[18 + 15 * (1 - relative)],
                difference=-0.002,
                difference_se=0.0011,
                train_relative=relative - 0.02,
                num_windows=64,
            )
            file.write(msgspec.json.encode(line) + b"\n")
    state = "running" if step < num_steps else "done"
    status = RunStatus(state=state, step=step, num_steps=num_steps)
    (folder / "status.json").write_bytes(msgspec.json.encode(status))


def write_samples(run: Path, steps: tuple[int, ...] = (0, 300, 600)) -> None:
    """Sampling events, the base at step 0."""
    for place, step in enumerate(steps):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        clips = []
        for number, (_, prompt) in enumerate(PROMPTS):
            name = f"{number}-7.mp4"
            write_clip(folder / name, hue=40 * number + 25 * place)
            difference = 4.0 * place if step else None
            clips.append(SampleClip(name, prompt, task="t2v", seed=7, difference_levels=difference))
        found = SampleSet(
            step=step,
            shape=f"{_WIDTH_PX}x{_HEIGHT_PX}x{_NUM_FRAMES}",
            num_steps=25,
            guidance=5.0,
            shift=5.0,
            tiled=False,
            lora_xxh3=f"{step:032x}" if step else "",
            norms={"attn1": 0.1 * place, "ffn": 0.2 * place} if step else {},
            clips=clips,
        )
        (folder / "samples.json").write_bytes(msgspec.json.encode(found))


def write_evaluation(folder: Path, num_seeds: int = 3) -> None:
    """An evaluation of the base and a LoRA, with real clips beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for place, variant in enumerate(("real", "base", "step-00000600")):
        (folder / variant).mkdir(exist_ok=True)
        for number, (category, prompt) in enumerate(PROMPTS):
            for seed in range(num_seeds):
                file = f"{variant}/{number}-{seed}.mp4"
                write_clip(folder / file, hue=50 * place + 20 * number + 5 * seed)
                clips.append(ResultClip(variant, file, prompt, f"p{number}", category, seed))
    extractor = "i3d_torchscript.pt sha256 bec6519f"
    metrics = [
        Metric("fvd", "real", value=31.0, n=160, low=27.0, high=36.0, model=extractor),
        Metric("fvd", "base", value=812.0, n=160, low=777.0, high=850.0, model=extractor),
        Metric(
            "fvd",
            "step-00000600",
            value=634.0,
            n=160,
            low=601.0,
            high=670.0,
            floor=31.0,
            target="<= 1140",
            reached=True,
            model=extractor,
        ),
        Metric("clip_cosine", "base", value="not measured", why="no image-text encoder is given"),
    ]
    comparisons = [
        Comparison(
            "fvd",
            "step-00000600",
            difference=-178.0,
            low=-231.0,
            high=-130.0,
            n=40,
            verdict="better",
        ),
        Comparison(
            "fvd",
            "step-00000600",
            category=PROMPTS[0][0],
            difference="not measured",
            n=20,
            verdict="too_few",
        ),
    ]
    result = Result(
        name=folder.name,
        set_hash="3f2a9c",
        num_prompts=len(PROMPTS),
        num_seeds=num_seeds,
        variants=[
            Variant("real"),
            Variant("base"),
            Variant("step-00000600", "step-00000600.safetensors", "ab" * 16, 8.0),
        ],
        metrics=metrics,
        comparisons=comparisons,
        clips=clips,
        grade="not measured",
        grade_rule="every target reached; one item was not measured",
    )
    (folder / "result.json").write_bytes(msgspec.json.encode(result))


def write_build_log(dataset: Path) -> None:
    """build.jsonl of a build that is probing."""
    for stage, done, left, rate in (("labels", 42, None, 900.0), ("probe", 20, 22, 2.5)):
        record = BuildRecord(
            stage=stage, done=done, left=left, rate_per_s=rate, time_s=1_790_000_000.0
        )
        append_record(dataset, record)


def write_clip(path: Path, hue: int) -> None:
    """A square that moves over a coloured ground, as H.264."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.width, stream.height, stream.pix_fmt = _WIDTH_PX, _HEIGHT_PX, "yuv420p"
        for number in range(_NUM_FRAMES):
            picture = np.full((_HEIGHT_PX, _WIDTH_PX, 3), (hue % 256, 120, 180), np.uint8)
            left = 8 * number
            picture[36:60, left : left + 24] = (250, 230, 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
