"""All SQL of shardgen is in its catalog, and the report's template travels with the package. The
order of its sub-packages is in test_layout.py.
"""

from pathlib import Path

import pytest
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[1]


def test_all_sql_is_in_the_catalog() -> None:
    for path in sorted((ROOT / "shardgen").rglob("*.py")):
        if path.parent.name != "catalog":
            text = path.read_text(encoding="utf-8")
            assert ".execute(" not in text and "SELECT " not in text, path


def test_setuptools_packs_the_template_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    # else setuptools asks git, and writes a folder of its own
    distribution.include_package_data = False
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    packed = {package: names for package, _, _, names in command.data_files}
    assert packed["shardgen.report"] == ["page.html"]
