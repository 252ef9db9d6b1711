"""Inside shardgen data passes in one direction: cli > config > build, recipe, verify > report,
stages > encode > catalog > rules > labels, media. No arrow goes up, late imports included.
"""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the top down. A part may import what stands on a lower floor, and itself.
FLOORS = (
    {"cli"},
    {"config"},
    {"build", "verify"},
    {"recipe"},
    {"report", "stages"},
    {"encode"},
    {"catalog"},
    {"rules"},
    {"labels", "media"},
)


def imported_parts(source: str) -> set[str]:
    """Sub-packages and top modules of shardgen that the source imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("shardgen.")}


def test_no_arrow_goes_up_or_sideways() -> None:
    floor_of = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    upward = []
    for path in sorted((ROOT / "shardgen").rglob("*.py")):
        part = path.relative_to(ROOT / "shardgen").parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for other in imported_parts(path.read_text(encoding="utf-8")) - {part}:
            if floor_of[other] <= floor_of[part]:
                upward.append(f"{path.relative_to(ROOT)} imports shardgen.{other}")
    assert upward == []


def test_all_sql_is_in_the_catalog() -> None:
    for path in sorted((ROOT / "shardgen").rglob("*.py")):
        if path.parent.name != "catalog":
            text = path.read_text(encoding="utf-8")
            assert ".execute(" not in text and "SELECT " not in text, path


def test_the_template_of_the_report_is_package_data() -> None:
    assert (ROOT / "shardgen/report/page.html").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["shardgen.report"] == ["page.html"]
