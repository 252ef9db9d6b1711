"""The house plan holds: a fixed top level, who imports whom, no circle, short files, no stdlib
shadows, a torch-free contract.
"""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from functools import cache
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
# Inside a package imports go down: a module or sub-package may import what stands on a lower floor,
# and itself. Whatever is new gets its floor here.
FLOORS: dict[str, tuple[set[str], ...]] = {
    "loader": (
        {"feed", "walk"},
        {"batch"},
        {"dataset", "dali"},
        {"read", "vae"},
        {"shard"},
        {"batching", "exclusions", "identity", "order", "store"},
        {
            "config",
            "feed_config",
            "host_memory",
            "manifest",
            "pinned",
            "registered",
            "remote",
            "shuffle",
        },
        {"cache", "models", "sample"},
        {"files", "mp4", "shape"},
    ),
    "train": (
        {"main"},
        {"evaluation", "reports"},
        {"validator", "open_sampler"},
        {"setup"},
        {"run"},
        {"base", "choices"},
        {"config"},
        {"early_stop", "subjects"},
        {"sampling", "validate"},
        {"diagnose", "progress", "status"},
        {"tally"},
        {
            "average",
            "checkpoint",
            "contact_sheet",
            "denoise",
            "optim",
            "signals",
            "step",
            "watch",
            "windows",
        },
        {"cards", "clip_gif", "flow", "records", "stopwatch", "tracking"},
        {"placement"},
        {"lora"},
        {"activations"},
        {"model", "parallel"},
        {"kernels"},
    ),
    "shardgen": (
        {"cli"},
        {"config"},
        {"build", "verify"},
        {"recipe"},
        {"report", "stages"},
        {"encode"},
        {"catalog"},
        {"rules"},
        {"labels", "media"},
    ),
}
TORCH_FREE = (
    "loader.shape",
    "loader.sample",
    "loader.manifest",
    "loader.models",
    "loader.config",
    "loader.order",
    "loader.files",
    "loader.host_memory",
    "loader.identity",
    "loader.exclusions",
    "loader.feed_config",
    "loader.dataset",
    "loader.batching",
    "train.records",
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


def imported_modules(source: str, modules: Collection[str]) -> set[str]:
    """Those of `modules` that the source imports anywhere, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            for alias in node.names:
                # a module of that package, or a name in that module
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in modules else node.module or "")
    return names & set(modules)


@cache
def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, late imports included."""
    paths = {}
    for path in _sources(*PYTHON_FOLDERS):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts).removesuffix(".__init__")] = path
    return {
        module: imported_modules(path.read_text(encoding="utf-8"), paths)
        for module, path in paths.items()
    }


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of an import circle, its first one twice; empty if there is none."""
    finished: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(graph[module]):
            if circle := follow(other, [*path, module]):
                return circle
        finished.add(module)
        return []

    for module in sorted(graph):
        if circle := follow(module, []):
            return circle
    return []


def arrows_up(package: str, graph: dict[str, set[str]]) -> list[str]:
    """Imports inside `package` that don't go to a lower floor."""
    floor_of = {part: number for number, floor in enumerate(FLOORS[package]) for part in floor}
    found = []
    for module, others in sorted(graph.items()):
        for other in sorted(others):
            if not (module.startswith(f"{package}.") and other.startswith(f"{package}.")):
                continue
            part, other_part = module.split(".")[1], other.split(".")[1]
            if part != other_part and floor_of[other_part] <= floor_of[part]:
                found.append(f"{module} imports {other}")
    return found


def test_a_late_import_is_seen_and_a_circle_named() -> None:
    modules = {"p", "p.a", "p.b", "p.c"}
    late = "import os\nfrom p.b import name\ndef f():\n    from p import c\n"
    assert imported_modules(late, modules) == {"p.b", "p.c"}
    graph: dict[str, set[str]] = {"p.a": {"p.b", "p.c"}, "p.b": set(), "p.c": {"p.a"}}
    assert find_circle(graph) == ["p.a", "p.c", "p.a"]
    assert find_circle(graph | {"p.c": {"p.b"}}) == []
    assert arrows_up("train", {"train.kernels.a": {"train.model.b", "train.kernels.c"}}) == [
        "train.kernels.a imports train.model.b"
    ]


def test_no_import_closes_a_circle() -> None:
    assert find_circle(import_graph()) == []


@pytest.mark.parametrize("package", FLOORS)
def test_imports_inside_a_package_go_down(package: str) -> None:
    graph = import_graph()
    parts = {module.split(".")[1] for module in graph if module.startswith(f"{package}.")}
    without_floor = parts - set().union(*FLOORS[package])
    assert not without_floor, f"give {without_floor} a floor in FLOORS"
    assert arrows_up(package, graph) == []


def test_kernels_import_nothing_else_of_train() -> None:
    for module, others in import_graph().items():
        if module.startswith("train.kernels"):
            assert all(other.startswith("train.kernels") for other in others), module


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
    vague = {"utils", "common"}
    for path in _sources(*PYTHON_FOLDERS):
        assert vague.isdisjoint(path.relative_to(ROOT).with_suffix("").parts), path


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in _sources(*PYTHON_FOLDERS)
    }
    assert lengths, "no sources found"
    assert {
        name: n for name, n in lengths.items() if n > MAX_LINES and name not in MAY_BE_LONGER
    } == {}


def test_the_readmes_map_names_every_module() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    house = set(re.findall(r"\w+", text[text.index("## The house") :]))
    modules = {path.stem for path in _sources(*PACKAGES)} - {"__init__"}
    # device code and launchers stand beside the kernel that the map names
    missing = {re.sub(r"_(triton|launch)$", "", module) for module in modules} - house
    assert not missing, f"add a word for {sorted(missing)} to README's map"


def test_a_packages_own_map_names_all_its_modules() -> None:
    """Of packages below the top ones, and of train."""
    inits = [path for path in _sources(*PYTHON_FOLDERS) if path.name == "__init__.py"]
    missing = set[str]()
    for init in inits:
        folder = init.parent
        if folder.parent == ROOT and folder.name != "train":
            continue
        words = set(re.findall(r"\w+", init.read_text(encoding="utf-8")))
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        # device code and launchers stand beside the kernel that the map names
        for module in modules - words:
            if re.sub(r"_(triton|launch)$", "", module) not in words:
                missing.add(f"{folder.name}/{module}")
    assert not missing, f"add a word for {sorted(missing)} to their __init__.py"


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
