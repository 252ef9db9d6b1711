"""What reviewers exclude gives no new samples, and samples that are planned stay, with a flag."""

from pathlib import Path

import pytest
from stage_runs import add_image, config_of, finish_all, open_catalog, png, row, run, shards


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "labels"


EXCLUDED = ("rejected", "excluded_by_review")


def test_an_excluded_label_has_that_reason_and_the_totals_add_up(root: Path) -> None:
    labels = [add_image(root, f"200000{i}", png(i)) for i in range(3)]
    ends = run(config_of(root), frozenset({labels[1], "nowhere.json"}))
    assert ends == {
        labels[0]: ("accepted", ""),
        labels[1]: EXCLUDED,
        labels[2]: ("accepted", ""),
    }


def test_an_exclusion_that_is_taken_back_gives_the_sample(root: Path) -> None:
    label = add_image(root, "2000001", png(1))
    assert run(config_of(root), frozenset({label})) == {label: EXCLUDED}
    assert run(config_of(root), frozenset({label})) == {label: EXCLUDED}
    assert run(config_of(root)) == {label: ("accepted", "")}


def test_a_label_excluded_after_its_shard_was_written_stays_there_with_a_flag(root: Path) -> None:
    config = config_of(root)
    label = add_image(root, "2000001", png(1))
    run(config)
    finish_all(config)
    planned = shards(config)
    assert run(config, frozenset({label})) == {label: ("accepted", "")}
    assert row(config, label)["flags"] == "excluded_by_review" and shards(config) == planned
    run(config)
    assert row(config, label)["flags"] == ""


def test_the_twin_of_an_excluded_clip_takes_its_place(root: Path) -> None:
    first, same_bytes = add_image(root, "2000001", png(1)), add_image(root, "2000002", png(1))
    same_id = "z.json"
    (root / same_id).write_bytes((root / first).read_bytes())
    (root / "z.png").write_bytes(png(3))
    config = config_of(root)
    ends = run(config)
    assert ends[same_bytes] == ("duplicate", "duplicate_media")
    assert ends[same_id] == ("rejected", "clip_id_repeated")
    # nothing is written yet, so another recipe plans anew; here the exclusion comes first
    other = config_of(root, output=str(root.parent / "other"))
    Path(other.output).mkdir()
    ends = run(other, frozenset({first}))
    assert ends == {first: EXCLUDED, same_bytes: ("accepted", ""), same_id: ("accepted", "")}


def test_judging_anew_after_an_exclusion_needs_no_new_recipe(root: Path) -> None:
    rejected = add_image(root, "2000001", png(1), resolution="unknown")
    config = config_of(root)
    assert run(config) == {rejected: ("rejected", "resolution_unknown")}
    assert run(config, frozenset({rejected})) == {rejected: EXCLUDED}
    assert run(config) == {rejected: ("rejected", "resolution_unknown")}
    with open_catalog(config) as catalog:
        assert catalog.count() == 1
