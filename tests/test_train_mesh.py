"""The end of a run's processes: what torch imports late counts, and what the interpreter's end
would do. So they are forks of an interpreter that has imported nothing but the module.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from trainer_runs import ROOT, Group

from train.parallel import mesh

# What a process does last in its group. The first optimizer imports torch._dynamo.
LAST = {
    "an optimizer": "torch.optim.AdamW([torch.zeros(1, requires_grad=True)])\n"
    "assert 'torch._dynamo' in sys.modules",
    "nothing": "pass",
    "a reason": "sys.exit('what to do')",
    "a code": "sys.exit(143)",
    "a fault of ours": "raise AssertionError('wrong')",
    "a loss": """if world.rank:
    os._exit(7)
for collective in (mesh.gather, mesh.broadcast, mesh.maximum):
    try:
        collective(1, world)
    except mesh.PeerLostError:
        print("lost", end=" ")""",
}
# The interpreter's end deletes `end`: it clears the module.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from train.parallel import mesh

class End:
    def __del__(self):
        print("the interpreter's end", flush=True)

def main():
    with mesh.process_group() as world:
        mesh.barrier(world)
        exec(last)
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print([name for name in threads if "gloo" in name])

ranks = {}
for name, (last, environment) in json.loads(sys.argv[1]).items():
    for rank in "01":
        pid = os.fork()
        if not pid:
            os.environ |= environment | {"RANK": rank}
            os.dup2(os.open(f"{name} {rank} out", os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(f"{name} {rank} err", os.O_WRONLY | os.O_CREAT), 2)
            end = End()
            mesh.run_program(main)
            sys.exit()
        ranks[pid] = f"{name} {rank} code"
for _ in list(ranks):
    pid, status = os.wait()
    Path(ranks[pid]).write_text(str(os.waitstatus_to_exitcode(status)))
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every process has said, and its exit code."""
    folder = tmp_path_factory.mktemp("ranks")
    groups = {name: Group(2) for name in LAST}
    given = {name: (last, groups[name].environment) for name, last in LAST.items()}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=600,
    )
    return folder


def said(folder: Path, last: str) -> list[Said]:
    """Of both processes."""
    return [
        Said(
            int((folder / f"{last} {rank} code").read_text()),
            _ours((folder / f"{last} {rank} out").read_text()),
            (folder / f"{last} {rank} err").read_text(),
        )
        for rank in range(2)
    ]


def _ours(text: str) -> str:
    """torch 2.10 tells there of gloo's connections too."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def test_no_thread_of_gloo_outlives_the_group(folder: Path) -> None:
    for rank in said(folder, "an optimizer"):
        assert (rank.code, rank.out) == (0, "[]\n"), rank.err


@pytest.mark.parametrize(
    ("last", "code", "out", "err"),
    [
        ("nothing", 0, "[]\n", ""),
        ("a reason", 1, "", "what to do\n"),
        ("a code", 143, "", ""),
        ("a fault of ours", 1, "", "AssertionError: wrong\n"),
    ],
)
def test_a_process_of_several_never_gets_to_the_interpreters_end(
    folder: Path, last: str, code: int, out: str, err: str
) -> None:
    for rank in said(folder, last):
        assert (rank.code, rank.out) == (code, out), rank.err
        assert rank.err.endswith(err)


def test_whoever_waits_for_a_lost_process_hears_of_it(folder: Path) -> None:
    left, lost = said(folder, "a loss")
    assert lost.code == 7 and left.out.startswith("lost lost lost "), left.err


def test_processes_wait_for_an_odd_clip_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's own limit, ten minutes, is less than a clip of a long shape takes on a V100."""
    asked: dict[str, Any] = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(mesh, "open_store", lambda rank: None)
    monkeypatch.setattr(mesh, "meet", lambda store, rank, size: None)
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda _, **named: asked.update(named)
    )
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    with mesh.process_group():
        assert asked["timeout"] >= timedelta(hours=1)
