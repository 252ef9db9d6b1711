"""Exact drop-frame timecodes, lengths and dates; what is none of them is refused."""

import pytest

from shardgen.labels.timecode import TimecodeError, iso_date, length_s, timecode_frame


def test_dates_and_lengths() -> None:
    assert iso_date("Sun Mar 01 2020 00:00:00 GMT+0900 (Korean Standard Time)") == "2020-03-01"
    assert iso_date("2020-03-01") == iso_date("Sun Foo 01 2020") == ""
    assert length_s("00:39:43.65") == 2383.65
    assert length_s("00:00:04") == length_s(" 00:00:04.000 ") == 4.0
    assert length_s("00:00:04.125") == length_s("0:00:04,125") == 4.125
    assert length_s("39:43.65") is length_s("00:61:00.00") is length_s("00:00:10;05") is None


def test_timecodes_count_every_frame_of_an_hour_once() -> None:
    expected, skipped = 0, 0
    for minute in range(60):
        for second in range(60):
            for frame in range(30):
                text = f"00:{minute:02}:{second:02};{frame:02}"
                if frame < 2 and second == 0 and minute % 10:
                    skipped += 1
                    with pytest.raises(TimecodeError, match="does not exist"):
                        timecode_frame(text)
                else:
                    assert timecode_frame(text) == expected
                    expected += 1
    assert expected == timecode_frame("01:00:00;00") == 107892  # 29.97 * 3600
    assert skipped == 54 * 2


@pytest.mark.parametrize(
    "text",
    ["00:00:00:00", "00:00:00;30", "00:60:00;00", "0:00:00;00", "٠٠:00:00;00", "x" * 10**6, ""],
)
def test_what_is_no_timecode_is_refused(text: str) -> None:
    with pytest.raises(TimecodeError):
        timecode_frame(text)
