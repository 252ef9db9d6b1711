"""Each figure against the target that the configuration sets, under the one name that
both know.
"""

import re
from pathlib import Path

import pytest

from loader.config import ConfigError, load_toml
from shardgen.config import ShardgenConfig
from shardgen.report.config import TargetsConfig
from shardgen.report.figures import (
    NOT_MEASURED,
    NOT_SET,
    Check,
    Figures,
    against_targets,
    count_sentences,
)
from shardgen.report.labels_ko_en import CHECKS, wording

DEMO = Path(__file__).parents[1] / "configs/shardgen/demo.toml"


def test_every_check_and_reason_has_words_in_both_languages() -> None:
    assert tuple(CHECKS) == TargetsConfig.__struct_fields__ and all(
        all(words) for words in CHECKS.values()
    )
    raised = re.compile(r'(?:LabelError|FetchError|MediaError|PlanError|Verdict)\(\s*"([a-z_]+)"')
    sources = "".join(path.read_text() for path in (DEMO.parents[2] / "shardgen").rglob("*.py"))
    reasons = set(raised.findall(sources))
    assert (
        len(reasons) > 25
        and {reason for reason in reasons if wording(reason) == (reason, reason)} == set()
    )


def check(name: str, value: float | str) -> Check:
    return Check(name, "", NOT_SET, value, "%", 7)


def test_every_check_can_have_a_target_and_every_target_has_a_check() -> None:
    assert tuple(each.name for each in Figures().checks()) == TargetsConfig.__struct_fields__


@pytest.mark.parametrize(
    ("value", "target", "reached"),
    [
        (99.5, ">= 99.5", True),
        (99.4, ">= 99.5", False),
        (25.0, "<=25", True),
        (25.1, "<= 25", False),
        (NOT_MEASURED, ">= 99.5", None),
        (99.5, "", None),
    ],
)
def test_a_target_is_reached_or_missed_and_neither_without_a_value(
    value: float | str, target: str, reached: bool | None
) -> None:
    checks = [check("file_validity", value), check("over_25_s", 3.0)]
    held, other = against_targets(checks, TargetsConfig(file_validity=target))
    assert (held.target, held.reached) == (target or NOT_SET, reached)
    assert other == checks[1]


def test_one_bad_file_of_a_million_is_not_rounded_away() -> None:
    figures = Figures()
    figures.fetched, figures.decodable = 1_000_000, 999_999
    first = against_targets(figures.checks(), TargetsConfig(file_validity=">= 100"))[0]
    assert (first.name, first.reached) == ("file_validity", False)


@pytest.mark.parametrize(
    "override",
    [
        "report.targets.file_validity=99.5",
        "report.targets.file_validity=> 99",
        "report.targets.filevalidity=>= 99",
    ],
)
def test_a_target_that_nobody_could_check_is_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=r"filevalidity|file_validity"):
        load_toml(DEMO, ShardgenConfig, [override])


def test_sentences_are_counted_by_their_ends_and_a_rest_counts_as_one() -> None:
    texts = ("", "끝났다.", "끝났다. 정말? 그렇다", "3.5초가 걸렸다.")
    assert [count_sentences(text) for text in texts] == [0, 1, 3, 1]
