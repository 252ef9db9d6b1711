"""build.py: every label file ends in one bucket, nothing of the input changes, and no kill
changes the bytes.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from extras import needs_ray

from loader.config import load_toml
from shardgen.catalog.catalog import Catalog
from shardgen.cli import main as shardgen
from shardgen.config import ShardgenConfig


def shard_bytes(dataset: Path) -> dict[str, str]:
    """Name -> hash of everything that has to be byte-identical."""
    files = [dataset / "manifest.json", dataset / "empty_prompt.text.zst", *dataset.glob("*/*")]
    return {
        str(path.relative_to(dataset)): xxhash.xxh3_128_hexdigest(path.read_bytes())
        for path in sorted(files)
        if path.parent.name != "cache"
    }


def tree_state(root: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path): (
            path.stat().st_mtime_ns,
            xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else "",
        )
        for path in sorted(root.rglob("*"))
    }


def build_command(recipe: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "shardgen.cli",
        "build",
        str(recipe),
        "--set",
        f"output={output}",
        *more,
    ]


def worker_pids(pid: int) -> list[int]:
    """Processes that the build at `pid` started and that do the encoding."""
    workers = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"spawn_main" in status.with_name("cmdline").read_bytes():
                workers.append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return workers


def test_a_second_run_does_nothing(tiny_dataset: Path, tiny_recipe: Path) -> None:
    before = tree_state(tiny_dataset)
    assert shardgen(["build", str(tiny_recipe)]) == 0
    after = tree_state(tiny_dataset)
    catalog = {
        name
        for name in (*before, *after)
        if "catalog.sqlite" in name or "build.jsonl" in name or name == str(tiny_dataset)
    }
    assert {name: state for name, state in after.items() if name not in catalog} == {
        name: state for name, state in before.items() if name not in catalog
    }


def kill_until_built(
    recipe: Path, output: Path, num_kills: int, rng: random.Random, *options: str
) -> int:
    """Build with two workers, killing the program or one of its workers `num_kills` times, each
    at a random moment within nine seconds or the next four shards; then let it finish. Returns
    how many were still at work when killed.
    """
    command = build_command(recipe, output, "--workers", "2", *options)
    num_hit = 0
    for number in range(num_kills):
        enough = len(list(output.glob("*/*.tar"))) + rng.randint(1, 4)
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + rng.uniform(0.3, 9.0)
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and len(list(output.glob("*/*.tar"))) < enough
        ):
            time.sleep(0.01)
        num_hit += process.poll() is None
        victims = worker_pids(process.pid) if number % 2 else []
        if process.poll() is None and victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
            _, messages = process.communicate(timeout=600)
            assert process.returncode in (0, 2)
            assert process.returncode == 0 or (
                "run the build again" in messages and "Traceback" not in messages
            )
        else:
            process.kill()
            process.communicate(timeout=600)
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return num_hit


def build_on_a_full_disk(recipe: Path, output: Path) -> None:
    """No file may grow beyond 150 kB, which is less than a shard: a clear message, and nothing
    with a shard's name.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    full = subprocess.run(
        build_command(recipe, output), capture_output=True, text=True, preexec_fn=limit
    )
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert "File too large" in full.stderr or "the catalog can't be read or written" in full.stderr
    assert not (output / "manifest.json").exists() and not list(output.glob("*/*x9-000000.tar"))


def test_after_a_full_disk_and_kills_two_workers_end_with_the_same_bytes(
    tiny_dataset: Path, tiny_recipe: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    before = tree_state(tiny_corpus)
    build_on_a_full_disk(tiny_recipe, tmp_path / "out")
    kill_until_built(tiny_recipe, tmp_path / "out", 2, random.Random(1))
    assert shard_bytes(tmp_path / "out") == shard_bytes(tiny_dataset)
    assert tree_state(tiny_corpus) == before


@pytest.mark.soak
def test_one_build_is_killed_thirty_times(tiny_recipe: Path, tmp_path: Path) -> None:
    many = ["--set", "windows.samples_per_shard=1", "--set", "windows.per_shot=4"]
    subprocess.run(
        build_command(tiny_recipe, tmp_path / "calm", *many), check=True, capture_output=True
    )
    num_hit = kill_until_built(tiny_recipe, tmp_path / "out", 30, random.Random(0), *many)
    assert num_hit == 30, f"the build was over after {num_hit} kills"
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "calm")


@needs_ray
def test_ray_gives_the_same_bytes(tiny_dataset: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    subprocess.run(
        build_command(tiny_recipe, tmp_path / "out", "--executor", "ray"),
        check=True,
        capture_output=True,
    )
    assert shard_bytes(tmp_path / "out") == shard_bytes(tiny_dataset)


def test_workers_that_stand_in_another_folder_find_everything(
    tiny_recipe: Path,
    tiny_dataset: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of a Ray cluster that is already there do: its nodes' folder is not the
    program's.
    """

    def elsewhere(work: Any, jobs: Iterator[Any], *_: Any, **__: Any) -> Iterator[Any]:
        for job in jobs:
            with monkeypatch.context() as patch:
                patch.chdir("/")
                result = work(job, None)
            yield job, result

    monkeypatch.setattr("shardgen.stages.encode.run_units", elsewhere)
    monkeypatch.chdir(tmp_path)
    Path("labels").symlink_to(tiny_corpus)
    model = load_toml(tiny_recipe, ShardgenConfig).encode.model
    relative = {"output": "out", "labels.root": "labels", "encode.model": os.path.relpath(model)}
    assert (
        shardgen(
            [
                "build",
                str(tiny_recipe),
                *(f"--set={key}={value}" for key, value in relative.items()),
            ]
        )
        == 0
    )
    assert shard_bytes(tmp_path / "out") == shard_bytes(tiny_dataset)


def test_a_clip_that_comes_later_goes_to_a_new_shard_and_a_lost_one_comes_back(
    tiny_recipe: Path, tiny_dataset: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    output, corpus = tmp_path / "out", tmp_path / "corpus"
    shutil.copytree(tiny_dataset, output)
    shutil.copytree(tiny_corpus, corpus)
    old = min(corpus.glob("video/*/2400101.json"))
    old.with_name("2400199.json").write_text(old.read_text().replace("2400101", "2400199"))
    media = old.with_suffix(".mp4").read_bytes()
    # an empty box: other bytes, the same pictures
    old.with_name("2400199.mp4").write_bytes(media + b"\0\0\0\x08free")
    before = shard_bytes(output)
    lost = min(output.glob("train/*x9-000000.tar"))
    lost.unlink()

    assert (
        shardgen(
            [
                "build",
                str(tiny_recipe),
                "--set",
                f"output={output}",
                "--set",
                f"labels.root={corpus}",
            ]
        )
        == 0
    )
    after = shard_bytes(output)
    assert {
        name: digest for name, digest in after.items() if name in before and name != "manifest.json"
    } == {name: digest for name, digest in before.items() if name != "manifest.json"}
    new = [name for name in after if name not in before]
    assert {Path(name).suffix for name in new} == {".tar", ".idx", ".xxh3"} and len(
        {n[:-4] for n in new}
    ) <= 3
    assert shardgen(["verify", str(output), "--workers", "1"]) == 0


@needs_ray
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_node_is_killed_and_the_bytes_are_the_same(
    tiny_dataset: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        command = build_command(
            tiny_recipe,
            tmp_path / "out",
            "--executor",
            "ray",
            "--workers",
            "2",
            "--set",
            f"executor.address={cluster.address}",
        )
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not list((tmp_path / "out").glob("*/*.tar")):
            time.sleep(0.05)
        assert process.poll() is None, "the build was over before a node could be killed"
        cluster.remove_node(nodes[0], allow_graceful=False)
        _, messages = process.communicate(timeout=600)
        assert process.returncode == 0, messages
    finally:
        cluster.shutdown()
    assert shard_bytes(tmp_path / "out") == shard_bytes(tiny_dataset)


def test_a_split_without_samples_verifies_and_a_file_that_vanishes_costs_its_clip_alone(
    tiny_recipe: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    root, output = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(tiny_corpus, root)
    options = [
        "--set",
        f"labels.root={root}",
        "--set",
        f"output={output}",
        "--set",
        "split.val_share=0.0",
        "--set",
        "fetch.schemes=[]",
    ]
    assert shardgen(["build", str(tiny_recipe), *options, "--stage", "fetch"]) == 0
    with Catalog(output / "catalog.sqlite") as catalog:
        rows = list(catalog.clips("fetched"))
        uses = Counter(row.media_xxh3 for row in rows)
        gone = next(
            root / row.label
            for row in rows
            if row.media_type == "video" and uses[row.media_xxh3] == 1
        ).with_suffix(".mp4")
    gone.unlink()
    assert shardgen(["build", str(tiny_recipe), *options]) == 0
    assert (
        not (output / "val").exists() and shardgen(["verify", str(output), "--workers", "1"]) == 0
    )
    with Catalog(output / "catalog.sqlite") as catalog:
        (row,) = catalog.claims(gone.stem)
    # the second build has looked for it again, and then at its label's URL
    assert (row.status, row.reason) == ("unavailable", "url_refused")
