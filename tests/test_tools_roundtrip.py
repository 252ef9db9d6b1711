"""tools.roundtrip measures what it says, and writes figures and a sheet."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loader.mp4 import encode_mp4
from tools.roundtrip import main, similarity


def picture(seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    return small.repeat(16, 0).repeat(16, 1)


def test_equal_pictures_are_alike_and_noise_of_known_size_has_its_psnr() -> None:
    same = similarity(picture(), picture())
    assert same.psnr_db == math.inf and same.ssim == pytest.approx(1)
    shifted = (picture() // 2 + 10).astype(np.uint8)
    known = similarity(shifted, shifted + 5)
    assert known.psnr_db == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert 0.9 < known.ssim < 1
    assert similarity(picture(0), picture(1)).ssim < 0.5


def test_a_clip_goes_through_both_halves_of_the_vae(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_mp4(np.stack([picture()] * 12), 24.0))
    options = ["--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]
    assert main([str(clip), *options, "--shape", "96x64x5", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out/roundtrip.json").read_text())
    assert len(result["frames"]) == 5 and result["mean_psnr_db"] > 0
    with Image.open(tmp_path / "out/roundtrip.jpg") as sheet:
        assert sheet.size == (192, 256)
    assert "PSNR" in capsys.readouterr().out
    assert main([str(tmp_path / "none.mp4"), *options, "--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fps", "0"], "--fps 0.0: give frames a second, above 0"),
        (["--output", "{folder}/file"], "a file stands where a folder is needed"),
    ],
)
def test_what_can_not_be_done_is_told_before_the_clip_is_read(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    given = [each.format(folder=tmp_path) for each in options]
    arguments = ["nowhere.mp4", "--model", "nowhere", "--output", str(tmp_path / "out"), *given]
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_no_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["nowhere.mp4", "--model", "nowhere", "--output", "x", "--device", "cuda"])
    assert "argument --device: invalid choice: 'cuda'" in capsys.readouterr().err
