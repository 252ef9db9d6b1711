"""The house plan holds: a fixed top level, who imports whom, short files, no stdlib shadows, a
torch-free contract.
"""

import ast
import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shardgen", "loader", "train")
PYTHON_FOLDERS = (*PACKAGES, "tools", "bench", "tests")
TOP_LEVEL = {
    *PYTHON_FOLDERS,
    "configs",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    ".ci",
    ".gitignore",
}
MAY_IMPORT = {
    "loader": {"loader"},
    "shardgen": {"shardgen", "loader"},
    "train": {"train", "loader"},
}
TORCH_FREE = (
    "loader.shape",
    "loader.sample",
    "loader.manifest",
    "loader.config",
    "loader.order",
    "loader.files",
    "loader.identity",
    "loader.exclusions",
)
MAX_LINES = 350
MAY_BE_LONGER = {"train/model/wan.py"}


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(source: str, package: str) -> set[str]:
    """Top-level names that the source imports anywhere, function bodies included; a relative one
    is the package's.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").partition(".")[0])
    return names


def test_imported_names_sees_every_spelling() -> None:
    source = (
        "import a.b as c\nfrom d.e import f\nfrom . import g\ndef h():\n    if 1:\n        import i"
    )
    assert imported_names(source, "own") == {"a", "d", "own", "i"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    ours = set(PYTHON_FOLDERS)
    for path in _sources(package):
        names = imported_names(path.read_text(encoding="utf-8"), package) & ours
        assert names <= MAY_IMPORT[package], (
            f"{path.relative_to(ROOT)} imports {sorted(names - MAY_IMPORT[package])}"
        )


def test_tests_are_imported_by_nobody_else() -> None:
    for path in _sources("tools", "bench"):
        assert "tests" not in imported_names(path.read_text(encoding="utf-8"), path.parts[-2]), path


def test_the_top_level_is_fixed() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    found = {
        path.name
        for path in ROOT.iterdir()
        if path.name != ".git"
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }
    assert found == TOP_LEVEL
    assert not [
        path
        for path in ROOT.glob("*/*")
        if path.stem in ("utils", "common") and path.parts[-2] != ".venv"
    ]


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in _sources(*PYTHON_FOLDERS)
    }
    assert lengths, "no sources found"
    assert {
        name: n for name, n in lengths.items() if n > MAX_LINES and name not in MAY_BE_LONGER
    } == {}


def test_no_module_shadows_the_standard_library() -> None:
    """`torchrun train/main.py` and stray scripts put their own folder first on sys.path."""
    shadows = [path for path in _sources(*PYTHON_FOLDERS) if path.stem in sys.stdlib_module_names]
    assert shadows == []


def test_loader_init_is_empty() -> None:
    assert (ROOT / "loader/__init__.py").read_bytes() == b""


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_contract_is_torch_free(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_packages_of_pyproject_are_those_of_the_plan() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'shardgen = "shardgen.cli:main"' in text
    include = tomllib.loads(text)["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(ROOT), include=include))
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in _sources(*PACKAGES)
    }
    assert found == folders
