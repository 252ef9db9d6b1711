"""identity.py: a dataset of another model is refused by name, and what could not be compared is
said.
"""

from pathlib import Path
from typing import Any

import pytest

from loader.identity import check_identity, folder_xxh3
from loader.manifest import DatasetError, ShardInfo, make_manifest
from loader.models import FIRST_FRAME_AND_GREY, I2V_A14B, T2V_A14B, TI2V_5B, ModelKind
from loader.shape import WAN21, WAN22, LatentLayout

RECIPE = {"windows": {"fps": 24.0}, "models": {"vae": "abc"}}


def check(
    recipe: dict[str, Any],
    model: ModelKind = TI2V_5B,
    vae_xxh3: str = "abc",
    layout: LatentLayout = WAN22,
    condition: str = "",
) -> list[str]:
    manifest = make_manifest(recipe, {}, layout=layout, condition=condition)
    return check_identity("D", manifest, model=model, vae_xxh3=vae_xxh3)


def test_the_models_own_dataset_passes_without_a_word() -> None:
    assert check(RECIPE) == []


def test_another_layout_frame_rate_or_vae_is_refused_by_name() -> None:
    with pytest.raises(
        DatasetError, match=r"D: its latents have 48 channels.*those of Wan2.2-T2V-A14B 16 chann"
    ):
        check(RECIPE, T2V_A14B)
    with pytest.raises(
        DatasetError, match=r"D: its clips have 24 frames a second, Wan2.2-T2V-A14B takes 16"
    ):
        check(RECIPE, T2V_A14B, layout=WAN21)
    with pytest.raises(DatasetError, match=r"D: its latents are of another VAE.*abc.*def"):
        check(RECIPE, vae_xxh3="def")


def test_image_to_video_of_a14b_needs_its_condition_and_no_images() -> None:
    recipe = RECIPE | {"windows": {"fps": 16.0}}
    with pytest.raises(DatasetError, match=r"no condition, and Wan2.2-I2V-A14B learns from first"):
        check(recipe, I2V_A14B, layout=WAN21)
    assert check(recipe, I2V_A14B, layout=WAN21, condition=FIRST_FRAME_AND_GREY) == []
    # what a text-to-video model does not read does not harm it
    assert check(recipe, T2V_A14B, layout=WAN21, condition=FIRST_FRAME_AND_GREY) == []
    image = ShardInfo("train-64x48x1-000000", "64x48x1", 1, 1, "", "", "")
    manifest = make_manifest(
        recipe, {"train": [image]}, layout=WAN21, condition=FIRST_FRAME_AND_GREY
    )
    with pytest.raises(DatasetError, match=r"000000 holds images, and Wan2.2-I2V-A14B learns"):
        check_identity("D", manifest, model=I2V_A14B, vae_xxh3="abc")


def test_what_can_not_be_compared_is_said() -> None:
    (line,) = check(RECIPE, vae_xxh3="")
    assert line == "D: its VAE was not compared with the model's: this model folder has no vae"
    rate, vae = check({})
    assert "frame rate was not compared" in rate and "VAE was not compared" in vae


def test_a_folders_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    for side in "ab":
        (tmp_path / side / "in").mkdir(parents=True)
        (tmp_path / side / "config.json").write_text("{}")
        (tmp_path / side / "in" / "weights").write_bytes(b"123")
    first = folder_xxh3(tmp_path / "a")
    assert first == folder_xxh3(tmp_path / "b") and len(first) == 32
    (tmp_path / "b" / "in" / "weights").write_bytes(b"124")
    assert folder_xxh3(tmp_path / "b") != first
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "other.json")
    assert folder_xxh3(tmp_path / "a") != first
    (tmp_path / "empty").mkdir()
    assert folder_xxh3(tmp_path / "empty") == folder_xxh3(tmp_path / "absent") == ""
