"""files.py: a file has its name only when all of its bytes are there."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from loader.files import (
    LOCK_FILE,
    FolderInUseError,
    atomic_file,
    cause_of,
    file_xxh3,
    has_writer,
    sole_writer,
    told,
    write_atomic,
)

ROOT = Path(__file__).resolve().parent.parent


def test_a_file_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_equal_bytes_leave_the_file_untouched(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"same")
    os.utime(tmp_path / "a", (1, 1))
    write_atomic(tmp_path / "a", b"same")
    assert (tmp_path / "a").stat().st_mtime == 1


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from loader.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")


def test_threads_that_write_one_name_never_mix_their_bytes(tmp_path: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_atomic(tmp_path / "a", data), contents * 4))
    assert (tmp_path / "a").read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_the_hash_is_that_of_all_bytes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 3)
    (tmp_path / "a").write_bytes(data)
    assert file_xxh3(tmp_path / "a") == xxhash.xxh3_128_hexdigest(data)


def test_a_folder_has_one_writer_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from loader.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1]), 'run 7'):\n"
        "    print(flush=True); time.sleep(120)"
    )
    folder = tmp_path / "run"
    assert not has_writer(folder)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert has_writer(folder)
        with (
            pytest.raises(FolderInUseError, match="run: run 7 writes here already"),
            sole_writer(folder, "run 8"),
        ):
            pass
        process.kill()
    assert not has_writer(folder)
    with sole_writer(folder, "run 8"):
        assert has_writer(folder)


def test_a_full_disk_at_the_lock_names_its_path(tmp_path: Path) -> None:
    # in a process of its own, which may write to its pipe alone
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from loader.files import sole_writer, told\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    with sole_writer(Path(sys.argv[1]), 'a run'): pass\n"
        "except OSError as error:\n"
        "    print(told(error))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == f"{tmp_path / LOCK_FILE}: File too large\n"


def test_who_only_asks_whether_somebody_writes_keeps_nobody_from_writing(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "first"):
        pass
    with (tmp_path / LOCK_FILE).open("rb") as asking:
        # as has_writer holds it, for a moment
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, lambda: fcntl.flock(asking, fcntl.LOCK_UN))
        timer.start()
        with sole_writer(tmp_path, "second"):
            assert has_writer(tmp_path)
        timer.join()


def test_the_cause_of_an_error_has_neither_number_nor_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a").read_bytes()
    assert cause_of(caught.value) == "No such file or directory"
    assert cause_of(ValueError("the text")) == "the text"


def test_an_error_of_the_system_says_where_what_and_what_to_do(tmp_path: Path) -> None:
    assert told(ValueError("lora.rank = 3")) == "lora.rank = 3"
    assert told(OSError("one of ours")) == "one of ours"
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"))
    assert told(full) == (
        f"{tmp_path / 'a'}: No space left on device; free some space and run the same command, "
        f"what was finished stands"
    )
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_bytes()
    assert told(caught.value) == f"{tmp_path / 'none'}: No such file or directory; check the " + (
        "path, or make it first"
    )
