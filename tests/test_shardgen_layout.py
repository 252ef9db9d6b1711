"""All SQL of shardgen is in its catalog, and the report's template travels with the package. The
order of its sub-packages is in test_layout.py.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_all_sql_is_in_the_catalog() -> None:
    for path in sorted((ROOT / "shardgen").rglob("*.py")):
        if path.parent.name != "catalog":
            text = path.read_text(encoding="utf-8")
            assert ".execute(" not in text and "SELECT " not in text, path


def test_the_template_of_the_report_is_package_data() -> None:
    assert (ROOT / "shardgen/report/page.html").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["shardgen.report"] == ["page.html"]
