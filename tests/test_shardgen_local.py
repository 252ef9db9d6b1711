"""A file beside its label is found by name and hashed where it lies."""

import unicodedata
from pathlib import Path

import pytest
import xxhash

from shardgen.media.errors import FetchError
from shardgen.media.local import find_local, hash_local

BODY = bytes(range(256)) * 8192  # 2 MiB
NAME = "뉴스데스크_한강"
DIGEST = xxhash.xxh3_128_hexdigest(BODY)


def test_a_local_file_is_found_by_label_name_or_id_and_hashed_in_place(tmp_path: Path) -> None:
    label = tmp_path / "01_two_shots.json"
    assert find_local(label, "2400101", "video") is None
    (tmp_path / "2400101.png").write_bytes(b"not a video")
    assert find_local(label, "2400101", "video") is None
    by_id = tmp_path / "2400101.mp4"
    by_id.write_bytes(BODY)
    assert find_local(label, "2400101", "video") == by_id
    before = by_id.stat()
    assert hash_local(by_id) == (by_id, len(BODY), before.st_mtime_ns, DIGEST)
    assert by_id.stat().st_mtime_ns == before.st_mtime_ns and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "01_two_shots.mp4").write_bytes(b"")
    assert find_local(label, "2400101", "video") == tmp_path / "01_two_shots.mp4"
    with pytest.raises(FetchError, match="media_unreadable"):
        hash_local(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    "name",
    [f"2400101.{end}" for end in "MP4 m2ts MTS m4v Wmv VOB M2T flv 3gp".split()],
)
def test_every_suffix_of_footage_is_found_in_any_case(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BODY)
    assert find_local(tmp_path / "2400101.JSON", "2400101", "video") == tmp_path / name
    assert find_local(tmp_path / "2400101.json", "2400101", "image") is None


@pytest.mark.parametrize("name", ["a.WEBP", "a.jpe", "a.JFIF"])
def test_every_suffix_of_pictures_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BODY)
    assert find_local(tmp_path / "a.json", "1", "image") == tmp_path / name


@pytest.mark.parametrize("media_in_letters", [True, False])
def test_hangul_is_the_same_name_in_letters_and_in_syllables(
    tmp_path: Path, media_in_letters: bool
) -> None:
    letters, syllables = (unicodedata.normalize("NFD", NAME), unicodedata.normalize("NFC", NAME))
    media, label = (letters, syllables) if media_in_letters else (syllables, letters)
    (tmp_path / f"{media}.mp4").write_bytes(BODY)
    assert find_local(tmp_path / f"{label}.json", "1", "video") == tmp_path / f"{media}.mp4"


def test_of_several_files_the_one_that_is_spelt_as_the_label_is_taken(tmp_path: Path) -> None:
    for name in ("a.MP4", "a.mp4", "a.Mp4", "a.mov"):
        (tmp_path / name).write_bytes(BODY)
    assert find_local(tmp_path / "a.json", "1", "video") == tmp_path / "a.mp4"
    (tmp_path / "a.mp4").unlink()
    assert find_local(tmp_path / "a.json", "1", "video") == tmp_path / "a.MP4"
    (tmp_path / "b.mp4").mkdir()
    assert find_local(tmp_path / "b.json", "1", "video") is None
