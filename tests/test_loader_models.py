"""models.py: each folder is recognised, and what its model can't be asked for is refused."""

import json
import shutil
from pathlib import Path

import pytest

from loader.models import (
    I2V_A14B,
    KINDS,
    T2V_A14B,
    TI2V_5B,
    WAN21_T2V,
    ModelError,
    ModelKind,
    check_expert,
    check_i2v_share,
    kind_of,
    read_kind,
    read_layout,
)
from loader.shape import WAN21, WAN22


def write(folder: Path, kind: ModelKind, index: bool = True, boundary: float | None = None) -> Path:
    """The configs of a diffusers folder, without weights."""
    parts = ["transformer", "transformer_2"] if kind.boundary else ["transformer"]
    channels = {"in_channels": kind.in_channels, "out_channels": kind.out_channels, "eps": 1e-6}
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(channels))
    if index:
        ratio = {"boundary_ratio": boundary or kind.boundary}
        (folder / "model_index.json").write_text(json.dumps(ratio | {"vae": ["diffusers", "V"]}))
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_folder_tells_which_model_it_holds(kind: ModelKind, tmp_path: Path) -> None:
    assert read_kind(write(tmp_path, kind)) == kind


def test_one_expert_alone_tells_it_too(tmp_path: Path) -> None:
    folder = write(tmp_path, I2V_A14B)
    shutil.rmtree(folder / "transformer")
    assert read_kind(folder) == I2V_A14B


def test_the_folders_own_boundary_counts(tmp_path: Path) -> None:
    assert read_kind(write(tmp_path, T2V_A14B, boundary=0.8)).boundary == 0.8


def test_two_experts_without_a_boundary_are_not_taken_for_one_transformer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names no boundary_ratio"):
        read_kind(write(tmp_path, T2V_A14B, index=False))


@pytest.mark.parametrize("kind", [T2V_A14B, I2V_A14B, WAN21_T2V], ids=lambda kind: kind.name)
def test_one_expert_without_its_index_is_not_taken_for_wan21(
    kind: ModelKind, tmp_path: Path
) -> None:
    folder = write(tmp_path, kind._replace(boundary=None), index=False)
    with pytest.raises(ModelError, match=r"model_index.json: missing, .* download it too"):
        read_kind(folder)
    assert read_kind(write(tmp_path / "5b", TI2V_5B, index=False)) == TI2V_5B


def test_other_channels_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"36/16 with one transformer.*Wan2.2-I2V-A14B 36/16"):
        read_kind(write(tmp_path / "i2v", I2V_A14B._replace(boundary=None)))
    assert kind_of(20, 16, has_experts=True) is None
    with pytest.raises(ModelError, match=r"transformer.config.json: .*No such file"):
        read_kind(tmp_path / "nowhere")


def test_an_expert_is_named_just_where_there_are_two() -> None:
    with pytest.raises(ModelError, match=r"model.expert is not set.*from 0.875 on"):
        check_expert(T2V_A14B, None)
    with pytest.raises(ModelError, match=r'model.expert = "low": Wan2.1-T2V is one transformer'):
        check_expert(WAN21_T2V, "low")
    check_expert(TI2V_5B, None)
    check_expert(I2V_A14B, "low")


def test_the_share_of_image_to_video_is_the_models() -> None:
    check_i2v_share(TI2V_5B, 0.4)
    check_i2v_share(T2V_A14B, 0.0)
    check_i2v_share(I2V_A14B, 1.0)
    with pytest.raises(ModelError, match=r"data.i2v_share = 0.4: Wan2.2-T2V-A14B does text to vid"):
        check_i2v_share(T2V_A14B, 0.4)
    with pytest.raises(ModelError, match=r"Wan2.2-I2V-A14B does image to.*i2v_share = 1.0"):
        check_i2v_share(I2V_A14B, 0.4)


def test_the_vae_tells_the_layout(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({"z_dim": 48, "patch_size": 2}))
    assert read_layout(tmp_path) == WAN22
    config.write_text("{}")
    assert read_layout(tmp_path) == WAN21
    config.write_text(json.dumps({"z_dim": 4}))
    with pytest.raises(ModelError, match="4 channels and a stride of 8 pixels"):
        read_layout(tmp_path)
