"""Decoding ahead goes on into the next shard, and changes neither order nor outcome."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_jobs import job_for, spec_for, window

from shardgen.encode import decoding
from shardgen.encode.decoding import ClipReader, Decoded
from shardgen.encode.unit import EncodeSpec, ShardJob
from shardgen.rules.windows import Window


class FakeClips:
    """Stands for decode_clip: remembers what was begun; a clip of the name "bad" fails."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def decode(self, job: ShardJob, spec: EncodeSpec, windows: list[Window]) -> list[Decoded]:
        self.begun.append(windows[0].media_xxh3)
        if windows[0].media_xxh3.startswith("bad"):
            raise decoding.EncodeError("gone")
        return [Decoded(each, None, {}, []) for each in windows]  # type: ignore[arg-type]


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClips]:
    fake = FakeClips()
    monkeypatch.setattr(decoding, "decode_clip", fake.decode)
    yield fake


def job(number: int, names: list[str]) -> ShardJob:
    windows = [window(name, "1", 1000 * i) for i, name in enumerate(names)]
    return job_for(windows, {name: name for name in names}, number=number)


def test_the_next_shards_first_clips_are_begun_and_not_begun_again(
    clips: FakeClips, tmp_path: Path
) -> None:
    spec, reader = spec_for(tmp_path, tmp_path), ClipReader(2)
    first, second = job(0, ["a", "b", "c"]), job(1, ["d", "e", "f", "g"])
    decoded = [each.window.media_xxh3 for each in reader.windows(first, spec, second)]
    assert decoded == ["a", "b", "c"]
    decoded = [each.window.media_xxh3 for each in reader.windows(second, spec)]
    assert decoded == ["d", "e", "f", "g"]
    assert sorted(clips.begun) == list("abcdefg")


def test_another_shard_than_the_announced_one_is_decoded_all_the_same(
    clips: FakeClips, tmp_path: Path
) -> None:
    spec, reader = spec_for(tmp_path, tmp_path), ClipReader(2)
    list(reader.windows(job(0, ["a"]), spec, job(1, ["d"])))
    decoded = [each.window.media_xxh3 for each in reader.windows(job(2, ["e", "f"]), spec)]
    assert decoded == ["e", "f"]


def test_a_fault_in_the_next_shard_does_not_end_this_one(clips: FakeClips, tmp_path: Path) -> None:
    spec, reader = spec_for(tmp_path, tmp_path), ClipReader(2)
    following = job(1, ["bad"])
    assert len(list(reader.windows(job(0, ["a", "b"]), spec, following))) == 2
    with pytest.raises(decoding.EncodeError, match="gone"):
        list(reader.windows(following, spec))
