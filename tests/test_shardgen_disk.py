"""An output folder that may not be written, and a full disk: one clear line, exit code 2, and the
next run ends it.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from PIL import Image

from bench.label_tree import label_bytes, make_label

NOBODY = 65534
# root may write anywhere, so it becomes somebody else, once everything is imported that only root
# may be able to read
RUN = (
    f"import os, sys\nimport shardgen.cli\nif os.getuid() == 0: os.setuid({NOBODY})\n"
    "sys.exit(shardgen.cli.main(sys.argv[1:]))"
)
RECIPE = """
output = "{folder}/out"
[labels]
root = "{folder}/labels"
[windows]
buckets = ["64x32x1"]
[encode]
model = "{folder}/model"
"""


@pytest.fixture
def folder(tiny_checkpoint: Path) -> Iterator[Path]:
    """A folder that everybody may enter (pytest's own are the owner's alone) with labels, a model
    and a recipe.
    """
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "labels").mkdir()
        for number in range(3):
            label = make_label(f"200000{number}", shots=(("", ""),), media_type="image")
            (path / f"labels/200000{number}.json").write_bytes(label_bytes(label))
            Image.new("RGB", (64, 32), (90 * number, 200, 30)).save(
                path / f"labels/200000{number}.png"
            )
        shutil.copytree(tiny_checkpoint, path / "model")
        (path / "model").chmod(0o755)
        (path / "recipe.toml").write_text(RECIPE.format(folder=path))
        yield path
        for each in (path, *path.rglob("*")):
            if each.is_dir():
                each.chmod(0o755)


def build(
    recipe: Path, *more: str, program: tuple[str, ...] = ("-m", "shardgen.cli")
) -> tuple[int, str]:
    """Exit code and what was said last on stderr, which is never a traceback."""
    done = subprocess.run(
        [sys.executable, *program, "build", str(recipe), *more],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def build_as_nobody(folder: Path) -> str:
    """Build as somebody who may write nothing there; what was said last."""
    code, said = build(folder / "recipe.toml", "--stage", "plan", program=("-c", RUN))
    assert code == 2 and said.startswith("shardgen: ")
    return said


def test_a_read_only_output_folder_is_one_clear_line_and_the_next_run_goes_on(folder: Path) -> None:
    output = folder / "out"
    folder.chmod(0o555)
    assert str(output) in (said := build_as_nobody(folder)) and "Permission denied" in said
    folder.chmod(0o755)
    output.mkdir()
    output.chmod(0o555)
    assert str(output) in (said := build_as_nobody(folder)) and "can't open the catalog" in said
    output.chmod(0o755)

    assert build(folder / "recipe.toml", "--stage", "probe")[0] == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for path in (output, *before):
        path.chmod(0o555 if path == output else 0o444)
    assert str(output) in (said := build_as_nobody(folder)) and "read-only" in said
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    for path in (output, *before):
        path.chmod(0o755 if path == output else 0o644)
    assert build(folder / "recipe.toml", "--stage", "plan")[0] == 0


@pytest.mark.soak
def test_a_disk_that_grows_from_full_to_large_enough_ends_with_the_same_bytes(
    tiny_recipe: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if (mounted := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        codes = []
        for size in ("100k", "400k", "700k", "1m", "1500k", "2m", "64m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
            code, said = build(tiny_recipe, "--set", f"output={disk / 'out'}", "--workers", "2")
            assert code == 0 or (code == 2 and ("No space left" in said or "disk" in said)), said
            codes.append(code)
            for name, digest in shard_hashes(disk / "out").items():
                assert shard_hashes(tiny_dataset)[name] == digest, (
                    f"{name} is wrong on a disk of {size}"
                )
        assert codes[0] == 2 and codes[-1] == 0
        assert shard_hashes(disk / "out") == shard_hashes(tiny_dataset)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def shard_hashes(dataset: Path) -> dict[str, str]:
    """Every file of a shard that stands under its name."""
    return {
        path.name: xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in dataset.glob("*/*-0*.*")
        if path.suffix in (".tar", ".idx", ".xxh3")
    }
