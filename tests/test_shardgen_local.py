"""A file beside its label is found by name and hashed where it lies."""

from pathlib import Path

import pytest
import xxhash

from shardgen.media.errors import FetchError
from shardgen.media.local import find_local, hash_local

BODY = bytes(range(256)) * 8192  # 2 MiB
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
