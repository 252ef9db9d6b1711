"""bench.validation compares every number that a model has to do with."""

from pathlib import Path

import pytest

from bench.validation import furthest, main, numbers


def test_every_number_but_the_clocks_is_compared() -> None:
    record = {"step": 1, "loss": 2.0, "by_level": [0.5, 0.25], "elapsed_s": 3.0, "interval": None}
    assert dict(numbers(record)) == {
        ".step": 1.0,
        ".loss": 2.0,
        ".by_level[0]": 0.5,
        ".by_level[1]": 0.25,
    }
    one, other = dict(numbers(record)), dict(numbers(record | {"by_level": [0.5, 0.2500005]}))
    off, place = furthest([one], [other])
    assert off == pytest.approx(2e-6) and place == "step 0.by_level[1]"


def test_other_records_are_not_compared() -> None:
    for other in ([], [{".loss": 1.0}], [{".step": 1.0, ".loss": 1.0, ".psnr": 1.0}]):
        with pytest.raises(ValueError, match="can't be compared"):
            furthest([{".step": 1.0, ".loss": 1.0}], other)


@pytest.mark.soak
def test_one_process_and_two_validate_alike(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--tiny", "--shape", "64x64x9", "--layers", "2"]) == 0
