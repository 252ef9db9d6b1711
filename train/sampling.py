"""Samples in training: what the LoRA makes of a few captions now, beside what the base made.

    sampler = Sampler(...)
    event = sampler.sample(step)      every rank its share, into OUTPUT/samples/step-NNNNNNNN

Prompts are captions of the val split (every second one starts from its clip's first frame: image
to video) or free text that tools.prompts has encoded beforehand, so no text encoder is loaded.
The base model's clips are made once, with the adapters switched off, and kept under samples/base,
for the settings that they were made with. A step's folder appears by rename, whole.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
import zstandard
from msgspec import Meta
from torch import Tensor

from loader.files import naming, write_atomic
from loader.mp4 import encode_mp4
from loader.order import sample_seed
from loader.shape import Bucket, LatentLayout
from train.contact_sheet import contact_sheet
from train.denoise import Decoder, Frames, Schedule, denoise
from train.flow import NoiseLaws
from train.lora.adapters import LoRA
from train.model.attention import Attention
from train.model.wan import Wan
from train.parallel import mesh
from train.parallel.mesh import World
from train.records import SAMPLES_FILE, SAMPLES_FOLDER, SHEET_FILE, SampledClip, SampleEvent

log = logging.getLogger(__name__)


class SamplesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `[samples]` table."""

    # optimizer steps between samples; 0: none
    every: Annotated[int, Meta(ge=0)] = 500
    # captions of the val split, of as many categories as it has; 0: none
    num_clips: Annotated[int, Meta(ge=0)] = 4
    # instead, those of the samples with these keys
    keys: list[str] = []
    # a file of tools.prompts, whose texts come after the captions
    prompts: str = ""
    # WIDTHxHEIGHTxFRAMES; empty: each caption's own bucket, which a file of prompts does not have
    shape: str = ""
    num_steps: Annotated[int, Meta(ge=1)] = 25
    # 1: without; else two passes for each step. Unset: the model's own
    guidance: Annotated[float, Meta(ge=1.0)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


# under a row's name in the sheet
_MARKS = {"high": "x0 at\nboundary", "low": "from a\nclip"}


def schedule_of(config: SamplesConfig, laws: NoiseLaws, bucket: Bucket) -> Schedule:
    """How clips of this shape are denoised."""
    assert config.guidance is not None, "the run's configuration is resolved"
    shift = laws.of(bucket).shift
    return Schedule(config.num_steps, shift, config.guidance, laws.expert, laws.boundary)


def describe_part(laws: NoiseLaws) -> str:
    """What clips show that one expert made without the other; empty for a whole model."""
    if laws.expert is None:
        return ""
    if laws.expert == "high":
        return (
            f"the high-noise expert alone: its estimate of the clip at sigma {laws.boundary:g}, "
            f"so blurred"
        )
    return (
        f"the low-noise expert alone: clips of the val split, noised to sigma {laws.boundary:g} "
        f"and denoised"
    )


class Subject(NamedTuple):
    """What a clip is made of. text_SD: UMT5 rows on the device. first_frame_C1hw, or of A14B
    given_CThw: of I2V. start_CThw: the clip's latent, where sampling starts from it.
    """

    key: str
    prompt: str
    bucket: Bucket
    text_SD: Tensor
    first_frame_C1hw: Tensor | None = None
    given_CThw: Tensor | None = None
    start_CThw: Tensor | None = None

    @property
    def task(self) -> str:
        is_t2v = self.first_frame_C1hw is None and self.given_CThw is None
        return "t2v" if is_t2v else "i2v"


class Sampler:
    """One per process. `layout` and `fps` are the model's, `laws` are the run's. base_identity:
    what tells its base model from others, whose clips may lie in the same folder.
    """

    def __init__(
        self,
        *,
        model: Wan,
        adapters: LoRA,
        attention: Attention,
        decoder: Decoder,
        subjects: list[Subject],
        empty_SD: Tensor,
        layout: LatentLayout,
        laws: NoiseLaws,
        fps: float,
        config: SamplesConfig,
        output: Path,
        world: World,
        base_identity: Sequence[str] = (),
        uneven: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._model, self._adapters, self._attention = model, adapters, attention
        self._decoder, self._subjects, self._empty_SD = decoder, subjects, empty_SD
        self._layout, self._fps, self._config, self._world = layout, fps, config, world
        # around this rank's passes: others may make more (`Run.uneven`)
        self._uneven = uneven
        self._laws = laws
        self._base_identity = base_identity
        self._folder = output / SAMPLES_FOLDER

    def folder_of(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def sample(self, step: int, gets_on: Callable[[], None] = lambda: None) -> SampleEvent:
        """Make this rank's clips and, on the main rank, the sheet and samples.json; all ranks
        return the same event. gets_on: called on the way, before each step of each clip.
        """
        begin_s = time.perf_counter()
        folder, whole = self._folder / f".step-{step:08d}", self.folder_of(step)
        # the processes that can write there share them out
        makers = self._world.output_ranks or range(self._world.size)
        if self._world.is_main:
            # of a run that was killed meanwhile, perhaps with other clips
            shutil.rmtree(folder, ignore_errors=True)
        mesh.barrier(self._world)
        if self._world.sees_output:
            folder.mkdir(parents=True, exist_ok=True)
        num_subjects = len(self._subjects)
        # Each difference is written by one rank and zero on the others: the sum is exact.
        differences = torch.zeros(num_subjects, dtype=torch.float64, device=self._world.device)
        was_training = self._model.training
        self._model.eval()  # no dropout
        try:
            with self._uneven():
                for number in range(num_subjects):
                    if makers[number % len(makers)] != self._world.rank:
                        continue
                    subject, name = self._subjects[number], self._name(number)
                    base = self._base(subject, gets_on)
                    tuned = self._frames(subject, gets_on)
                    mark = f"\n{_MARKS[self._laws.expert]}" if self._laws.expert else ""
                    names = (f"{number + 1}\nbase{mark}", f"{number + 1}\nstep {step}{mark}")
                    rows = list(zip(names, (base, tuned), strict=True))
                    with naming(folder):
                        (folder / f"{name}.mp4").write_bytes(encode_mp4(tuned, self._fps))
                        contact_sheet(rows).save(folder / f"{name}.png")
                    differences[number] = np.abs(base.astype(np.int16) - tuned).mean()
        finally:
            self._model.train(was_training)
        mesh.all_reduce_sum(differences, self._world)
        event = self._event(step, differences.tolist(), time.perf_counter() - begin_s)
        if self._world.is_main:
            self._write_sheet(folder)
            write_atomic(folder / SAMPLES_FILE, msgspec.json.format(msgspec.json.encode(event)))
            shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed after this step
            folder.rename(whole)
        mesh.barrier(self._world)
        return event

    def _frames(self, subject: Subject, gets_on: Callable[[], None]) -> Frames:
        shape = self._layout.latent_shape(subject.bucket)
        # on the CPU, so that the clip is the same on every machine, up to rounding
        generator = torch.Generator().manual_seed(sample_seed(self._config.seed, 0, subject.key))
        latent_CThw = denoise(
            self._model,
            self._attention,
            text_SD=subject.text_SD,
            empty_SD=self._empty_SD,
            noise_CThw=torch.randn(*shape, generator=generator).to(self._world.device),
            schedule=schedule_of(self._config, self._laws, subject.bucket),
            first_frame_C1hw=subject.first_frame_C1hw,
            given_CThw=subject.given_CThw,
            start_CThw=subject.start_CThw,
            gets_on=gets_on,
        )
        if not bool(latent_CThw.isfinite().all()):
            raise ValueError(
                f"samples: the latent of {subject.key} ({subject.task}, {subject.bucket}) is not "
                f"finite; use another model.dtype, a lower optim.lr in a new output, or set "
                f"samples.every = 0"
            )
        return self._decoder.decode(latent_CThw)

    def _base(self, subject: Subject, gets_on: Callable[[], None]) -> Frames:
        """The base model's clip, made once: raw frames for comparing, an MP4 for looking."""
        folder = self._folder / "base"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{subject.task}-{subject.key[:12]}-{self._settings_hash(subject)}"
        path, bucket = folder / f"{stem}.rgb.zst", subject.bucket
        shape = (bucket.num_frames, bucket.height_px, bucket.width_px, 3)
        try:
            data = zstandard.ZstdDecompressor().decompress(path.read_bytes())
            return np.frombuffer(data, np.uint8).reshape(shape)
        except FileNotFoundError:
            pass
        except (zstandard.ZstdError, ValueError) as error:
            log.warning("%s is damaged (%s), and made again", path, error)
        with self._adapters.switched_off():
            frames = self._frames(subject, gets_on)
        write_atomic(folder / f"{stem}.mp4", encode_mp4(frames, self._fps))
        write_atomic(path, zstandard.ZstdCompressor(write_checksum=True).compress(frames.tobytes()))
        return frames

    def _settings_hash(self, subject: Subject) -> str:
        schedule = schedule_of(self._config, self._laws, subject.bucket)
        num_fields = len(schedule) if schedule.expert else 3
        drawn = (schedule[:num_fields], self._config.seed, str(subject.bucket), subject.prompt)
        settings = (*drawn, self._base_identity)
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode(settings))

    def _name(self, number: int) -> str:
        subject = self._subjects[number]
        return f"{number + 1:02d}-{subject.task}-{subject.key[:12]}"

    def _write_sheet(self, folder: Path) -> None:
        from PIL import Image

        rows = []
        for number in range(len(self._subjects)):
            path = folder / f"{self._name(number)}.png"
            with Image.open(path) as strip:
                rows.append(strip.convert("RGB"))
            path.unlink()
        sheet = Image.new(
            "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
        )
        top_px = 0
        for row in rows:
            sheet.paste(row, (0, top_px))
            top_px += row.height
        with naming(folder):
            sheet.save(folder / SHEET_FILE)

    def _event(self, step: int, differences: list[float], elapsed_s: float) -> SampleEvent:
        clips = [
            SampledClip(
                file=f"{self._name(number)}.mp4",
                key=subject.key,
                prompt=subject.prompt,
                task=subject.task,
                shape=str(subject.bucket),
                seed=sample_seed(self._config.seed, 0, subject.key),
                shift=self._laws.of(subject.bucket).shift,
                mean_difference_levels=differences[number],
            )
            for number, subject in enumerate(self._subjects)
        ]
        guidance, shift = self._config.guidance, self._laws.config.shift
        assert guidance is not None and shift is not None, "the run's configuration is resolved"
        return SampleEvent(
            step=step,
            num_steps=self._config.num_steps,
            guidance=guidance,
            shift=shift,
            tiled=False,
            shows=describe_part(self._laws),
            lora_xxh3=lora_hash(self._adapters),
            update_norms=update_norms(self._adapters),
            clips=clips,
            elapsed_s=elapsed_s,
        )


def lora_hash(adapters: LoRA) -> str:
    """xxh3_128 of all factors in the order of their names: which LoRA made these clips."""
    digest = xxhash.xxh3_128()
    for name, (a, b) in sorted(adapters.tensors().items()):
        digest.update(name.encode())
        for factor in (a, b):
            digest.update(np.ascontiguousarray(factor.cpu().numpy()).tobytes())
    return digest.hexdigest()


def update_norms(adapters: LoRA) -> dict[str, float]:
    """The Frobenius norm of scale * B A over all blocks, by kind of layer: 0 is no effect.

    |B A|^2 = sum of (B^T B) * (A A^T), so the [N, K] product is never made.
    """
    squares: dict[str, float] = {}
    scale = adapters.alpha / adapters.rank
    for name, (a_RK, b_NR) in adapters.tensors().items():
        target = name.split(".", 2)[2]
        product = ((b_NR.T @ b_NR) * (a_RK @ a_RK.T)).sum()
        squares[target] = squares.get(target, 0.0) + scale**2 * float(product)
    return {target: math.sqrt(max(square, 0.0)) for target, square in sorted(squares.items())}
