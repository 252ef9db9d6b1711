"""write.py: equal samples give equal bytes, whole files or none, and strangers can read them."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import xxhash

from loader.files import TEMPORARY, file_xxh3, write_atomic
from loader.manifest import decode_hashes, decode_index
from shardgen.encode.write import remove_leftovers, stored_size, write_shard

SAMPLES = [
    (f"{i:032x}", {"jpg": bytes([i]) * 700, "json": b"{}" * i, "latent.zst": os.urandom(512 * i)})
    for i in range(1, 6)
]


def test_equal_samples_give_equal_bytes_and_the_hashes_are_those_of_the_files(
    tmp_path: Path,
) -> None:
    infos = [
        write_shard(tmp_path / side, "train-160x96x9-000000", "160x96x9", SAMPLES) for side in "ab"
    ]
    assert infos[0] == infos[1]
    stem = tmp_path / "a" / "train-160x96x9-000000"
    for suffix, digest in (
        (".tar", infos[0].tar_xxh3),
        (".idx", infos[0].idx_xxh3),
        (".xxh3", infos[0].xxh3_xxh3),
    ):
        assert file_xxh3(stem.with_name(stem.name + suffix)) == digest
        assert (
            stem.with_name(stem.name + suffix).read_bytes()
            == (tmp_path / "b" / (stem.name + suffix)).read_bytes()
        )
    assert (
        infos[0].bytes == stored_size(tmp_path / "a", stem.name) == os.path.getsize(f"{stem}.tar")
    )


def test_headers_are_plain_ustar_without_times_or_owners(tmp_path: Path) -> None:
    write_shard(tmp_path, "s", "160x96x9", SAMPLES)
    with tarfile.open(tmp_path / "s.tar") as archive:
        entries = archive.getmembers()
    names = [
        f"{key}.{extension}" for key, _ in SAMPLES for extension in ("json", "latent.zst", "jpg")
    ]
    assert [entry.name for entry in entries] == names
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode, e.type) for e in entries} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }
    assert (tmp_path / "s.tar").read_bytes()[257:265] == b"ustar\x0000"
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "s.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == names and listed.stderr == ""


def test_index_and_hashes_point_at_the_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path, "s", "160x96x9", SAMPLES)
    data = (tmp_path / "s.tar").read_bytes()
    index = decode_index((tmp_path / "s.idx").read_bytes(), "s.idx")
    hashes = decode_hashes((tmp_path / "s.xxh3").read_bytes(), "s.xxh3")
    assert len(index) == len(SAMPLES)
    for members, (key, stored) in zip(index, SAMPLES, strict=True):
        for member in members:
            found = data[member.offset : member.offset + member.size]
            assert found == stored[member.name.removeprefix(f"{key}.")]
            assert hashes[member.name] == xxhash.xxh3_64_hexdigest(found)


def test_a_failure_in_mid_shard_leaves_nothing_with_a_shards_name(tmp_path: Path) -> None:
    def samples():  # type: ignore[no-untyped-def]
        yield SAMPLES[0]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, "s", "160x96x9", samples())
    assert list(tmp_path.iterdir()) == []
    assert stored_size(tmp_path, "s") is None


def test_keys_out_of_order_are_our_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="after"):
        write_shard(tmp_path, "s", "160x96x9", SAMPLES[::-1])


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_atomic(tmp_path / "train" / "s.idx", b"x")
    write_atomic(tmp_path / "manifest.json", b"{}")
    for name in ("manifest.json.77", "train/s.tar.77"):
        (tmp_path / (name + TEMPORARY)).write_bytes(b"half")
    # the user's: labels may lie in a folder beside the splits
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / f"1.json.7-8{TEMPORARY}").touch()
    (tmp_path / f"notes{TEMPORARY}").touch()
    assert len(remove_leftovers(tmp_path)) == 2
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["labels/1.json.7-8.tmp", "manifest.json", "notes.tmp", "train/s.idx"]
