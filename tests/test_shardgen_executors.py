"""executors.py: every unit's outcome comes back, whoever runs it; workers never outlive their
program.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardgen.encode.executors import ExecutorError, run_local


def work(unit: int) -> tuple[int, str, int]:
    if unit == 3:
        raise ValueError("three is not wanted")
    if unit == 4:
        raise FileNotFoundError(2, "gone", "four")
    if unit == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    if unit == 1000:
        time.sleep(600)
    return unit, os.environ.get("WORKER_NAME", ""), os.getpid()


def test_each_unit_comes_back_with_its_result_or_its_failure() -> None:
    environments = [{"WORKER_NAME": name} for name in "ab"]
    outcomes = dict(run_local(work, range(40), 2, environments))
    assert outcomes.keys() == set(range(40))
    assert isinstance(outcomes[3], ValueError) and isinstance(outcomes[4], FileNotFoundError)
    done = [outcome for outcome in outcomes.values() if isinstance(outcome, tuple)]
    assert sorted(outcome[0] for outcome in done) == sorted(set(range(40)) - {3, 4})
    assert {outcome[1] for outcome in done} <= {"a", "b"} and os.getpid() not in {
        outcome[2] for outcome in done
    }


def test_units_are_taken_lazily() -> None:
    taken = []

    def units():  # type: ignore[no-untyped-def]
        for unit in range(100, 200):
            taken.append(unit)
            yield unit

    results = run_local(work, units(), 1)
    next(results)
    assert len(taken) <= 3
    results.close()  # type: ignore[attr-defined]


def test_ray_is_not_started_for_nothing() -> None:
    script = (
        "import sys\nfrom shardgen.encode.executors import run_ray\n"
        "assert list(run_ray(print, iter([]), 2, '', {}, 1, 0)) == [] and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_a_dead_worker_is_a_clear_error() -> None:
    with pytest.raises(ExecutorError, match="a worker process died"):
        list(run_local(work, [1, 99], 1))


def test_workers_end_with_a_killed_program(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom test_shardgen_executors import work\n"
        "from shardgen.encode.executors import run_local\n"
        "if __name__ == '__main__':\n"
        "    for unit, result in run_local(work, [1, 2, 1000, 1000], 2):\n"
        "        print(result[2], flush=True)\n"
    )
    (tmp_path / "program.py").write_text(script)
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", here],
        stdout=subprocess.PIPE,
        text=True,
        cwd=here.parent,
    )
    assert process.stdout is not None
    workers = {int(process.stdout.readline()) for _ in range(2)}
    assert all(Path(f"/proc/{pid}").exists() for pid in workers)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 300
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its program"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
