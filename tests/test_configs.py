"""Every configuration in configs/ decodes strictly, and every constraint file pins what its
machine needs.
"""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from loader.config import load_toml
from shardgen.config import ShardgenConfig
from tools.evaluate.config import EvaluateConfig
from train.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
KINDS: dict[str, type[msgspec.Struct]] = {
    "shardgen": ShardgenConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}
FILES = sorted(CONFIGS.glob("*/*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_decodes(path: Path) -> None:
    kind = KINDS[path.parent.name]
    assert isinstance(load_toml(path, kind), kind)


def test_there_are_configurations_of_each_kind() -> None:
    assert {path.parent.name for path in FILES} == set(KINDS)


@pytest.mark.parametrize("name", ["cpu", "v100", "hopper"])
def test_constraints_are_exact_pins(name: str) -> None:
    lines = (CONFIGS / f"env/{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert sum(pin.startswith("torch==") for pin in pins) == 1


def test_v100_pins_the_last_wheels_that_contain_sm_70() -> None:
    pins = (CONFIGS / "env/v100.txt").read_text(encoding="utf-8").splitlines()
    assert {"torch==2.10.0", "nvidia-dali-cuda120==2.4.0", "bitsandbytes==0.50.2"} <= set(pins)


def test_cpu_pins_every_direct_dependency() -> None:
    root = CONFIGS.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: needs
        for name, needs in project["optional-dependencies"].items()
        if name not in ("dali-cuda13", "flash4")
    }  # they need a GPU
    names = {
        re.split(r"[^\w-]", need)[0] for need in sum(extras.values(), project["dependencies"])
    } - {"newsreel"}
    pinned = {
        line.partition("==")[0]
        for line in (CONFIGS / "env/cpu.txt").read_text(encoding="utf-8").splitlines()
    }
    assert names - pinned == set()
