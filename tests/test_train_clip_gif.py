"""TensorBoard gets the sheet and every clip of an event; adapters without effect are reported."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loader.mp4 import encode_mp4
from train.clip_gif import clip_gif
from train.progress import Progress
from train.records import SHEET_FILE, SampledClip, SampleEvent

LEVELS = np.linspace(0, 255, 9).astype(np.uint8)
FRAMES = np.broadcast_to(LEVELS[:, None, None, None], (9, 96, 640, 3))


def clip(name: str, difference: float) -> SampledClip:
    return SampledClip(
        file=name,
        key="k",
        prompt="p",
        task="t2v",
        shape="640x96x9",
        seed=1,
        mean_difference_levels=difference,
    )


def event(step: int, differences: list[float]) -> SampleEvent:
    return SampleEvent(
        step=step,
        num_steps=2,
        guidance=5.0,
        shift=5.0,
        tiled=False,
        lora_xxh3="",
        update_norms={"attn1.to_q": 0.5},
        clips=[clip(f"{number:02d}-t2v-k.mp4", each) for number, each in enumerate(differences)],
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number:02d}-t2v-k.mp4").write_bytes(encode_mp4(FRAMES, 24.0))
    Image.new("RGB", (30, 20)).save(folder / SHEET_FILE)
    return folder


def test_a_gif_has_every_second_frame_at_the_clips_speed_and_is_small(samples: Path) -> None:
    with Image.open(io.BytesIO(clip_gif(samples / "00-t2v-k.mp4"))) as gif:
        assert (gif.format, gif.size) == ("GIF", (320, 48))
        num_frames = sum(1 for _ in ImageSequence.Iterator(gif))
        assert num_frames == 5
        # GIF counts hundredths of a second
        assert gif.info["duration"] == pytest.approx(2000 / 24, abs=10)
        gif.seek(4)
        last = np.asarray(gif.convert("RGB")).mean()
    assert last > 240


def test_tensorboard_gets_the_sheet_the_clips_and_the_numbers(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tmp_path, 0, 8, is_evaluated=True) as opened:
        opened.show_samples(event(4, [1.5, 0.0]), samples)
    said = capsys.readouterr().err
    assert "step 4: 01-t2v-k.mp4 equal the base model's clips: the adapters have no effect" in said
    assert "{'attn1.to_q': 0.5}" in said and "00-t2v-k.mp4 equal" not in said
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    images = {"samples/sheet", "samples/00-t2v-k", "samples/01-t2v-k"}
    assert set(events.Tags()["images"]) == images
    (shown,) = events.Images("samples/00-t2v-k")
    assert shown.step == 4 and shown.encoded_image_string.startswith(b"GIF89a")
    (difference,) = events.Scalars("samples/difference/00-t2v-k")
    assert difference.value == 1.5
    assert "samples/update_norm/attn1.to_q" in events.Tags()["scalars"]


def test_the_base_itself_is_no_adapter_without_effect(
    tmp_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(tmp_path, 0, 8, is_evaluated=True) as opened:
        opened.show_samples(event(0, [0.0, 0.0]), samples)
    assert "no effect" not in capsys.readouterr().err
