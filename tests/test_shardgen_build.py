"""build.py: every label file ends in one bucket, nothing of the input changes, and no kill
changes the bytes.
"""

import csv
import json
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

from loader.config import load_toml
from loader.manifest import read_manifest
from shardgen.build import alone_in
from shardgen.catalog.catalog import Catalog
from shardgen.catalog.tables import FINAL
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


def test_every_label_file_of_the_corpus_ends_where_it_should(
    tiny_dataset: Path, tiny_corpus: Path
) -> None:
    expected = json.loads((tiny_corpus.parent / "corpus.expected.json").read_text())
    with Catalog(tiny_dataset / "catalog.sqlite") as catalog:
        rows = list(catalog.clips())
    found = {row.label: "kept" if row.status == "accepted" else row.reason for row in rows}
    assert found == expected
    assert len({reason for reason in found.values() if reason != "kept"}) >= 12
    assert len(found) == len(list(tiny_corpus.rglob("*.json")))


def test_the_totals_add_up(tiny_dataset: Path, tiny_corpus: Path) -> None:
    report = json.loads((tiny_dataset / "quality_report.json").read_text())
    num_labels = len(list(tiny_corpus.rglob("*.json")))
    assert report["label_files"] == num_labels == sum(report["statuses"].values())
    assert num_labels == sum(counts["total"] for counts in report["categories"].values())
    for counts in report["categories"].values():
        assert counts["total"] == sum(counts[status] for status in FINAL)
        assert counts["accepted"] == counts["accepted_train"] + counts["accepted_val"]
    shards = [info for infos in read_manifest(tiny_dataset).splits.values() for info in infos]
    assert sum(info.num_samples for info in shards) == sum(
        sum(of.values()) for of in report["samples"].values()
    )
    with (
        (tiny_dataset / "clean_dataset.csv").open(newline="", encoding="utf-8-sig") as clean,
        (tiny_dataset / "defective_samples.csv").open(
            newline="", encoding="utf-8-sig"
        ) as defective,
    ):
        kept, dropped = list(csv.DictReader(clean)), list(csv.DictReader(defective))
    assert (len(kept), len(dropped)) == (
        report["statuses"]["accepted"],
        num_labels - report["statuses"]["accepted"],
    )
    assert all(Path(row["media"]).is_absolute() and Path(row["media"]).is_file() for row in kept)
    assert any('"' in row["prompt"] for row in kept)
    metadata = [
        json.loads(line) for line in (tiny_dataset / "metadata.jsonl").read_text().splitlines()
    ]
    assert len(metadata) == len(kept)
    assert list(metadata[0]) == [
        "clip_id",
        "video_url",
        "thumbnail_urls",
        "prompt",
        "stt_script",
        "duration",
        "fps",
    ]
    assert report["programmes"]["on_both_sides"] == []
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["size_agreement"]["value"] == 0.0 and checks["size_agreement"][
        "sample_size"
    ] >= len(kept)


def test_the_report_is_printed_and_is_one_page_of_its_own(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    assert shardgen(["report", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "duplicate_media 1" in printed and "file_validity" in printed
    page = (copy / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 30
    assert "src='http" not in page and "<script" not in page and "<link" not in page
    for text in (
        "within 0.1 s of the declared one",
        "디코딩한 길이와",
        "the same bytes as another clip",
        "다른 클립과 똑같은 파일",
        "양쪽에 모두 있는 것</span>: none",
    ):
        assert text in page
    report = json.loads((copy / "quality_report.json").read_text())
    for reasons in report["reasons"].values():
        assert all(f"<code>{reason}</code>" in page for reason in reasons)


def test_a_dry_run_says_what_to_expect_and_encodes_nothing(
    tiny_recipe: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        shardgen(["build", str(tiny_recipe), "--set", f"output={tmp_path / 'dry'}", "--dry-run"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "not measured" in printed and "label files: 42" in printed
    assert not list((tmp_path / "dry").glob("*/*.tar"))
    expected = int(printed.partition("samples:")[2].split()[0])
    found = sum(
        info.num_samples for infos in read_manifest(tiny_dataset).splits.values() for info in infos
    )
    assert found <= expected <= 1.6 * found


def test_a_build_can_stop_after_a_stage_and_go_on(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(tiny_recipe), "--set", f"output={tmp_path / 'out'}"]
    assert shardgen([*arguments, "--stage", "probe"]) == 0
    stages = [
        line.partition(":")[0]
        for line in capsys.readouterr().out.splitlines()
        if "label files" in line
    ]
    assert (
        stages == ["labels", "filter", "fetch", "probe"]
        and not (tmp_path / "out" / "train").exists()
    )
    assert shardgen([*arguments, "--stage", "plan"]) == 0
    assert "accepted" in capsys.readouterr().out


def test_clips_that_wait_for_room_in_the_cache_are_work_left(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_recipe), "--set", f"output={tmp_path}", "--stage", "filter"]
    assert shardgen(command) == 0
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        catalog.db.execute(
            "UPDATE clips SET status = 'unavailable', reason = 'cache_full' WHERE clip_id = '2400101'"
        )
    assert shardgen(command) == 1
    assert "1 clips wait for room" in capsys.readouterr().out


def test_user_faults_are_one_line_and_exit_2(
    tiny_recipe: Path, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, words in [
        (["output=" + str(tiny_corpus / "out")], "choose a folder outside"),
        (["output=/proc/newsreel"], "/proc/newsreel"),
        (["labels.root=/nowhere"], "no such folder"),
        (["windows.fps=0"], "> 0.0 - at `$.windows.fps`"),
        (["encode.threads=0"], "$.encode.threads"),
        (["fetch.timeout_s=inf"], "$.fetch.timeout_s"),
        (["labels.limit=-1"], "$.labels.limit"),
        (["split.group_by=[]"], "split.group_by is empty"),
        (["nonsense=1"], "known keys"),
        ([f"output={tmp_path / 'out'}", "encode.model=/nowhere"], "diffusers"),
        ([f"output={tiny_recipe}/out"], "Not a directory"),
    ]:
        arguments = [part for override in overrides for part in ("--set", override)]
        assert shardgen(["build", str(tiny_recipe), *arguments]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("shardgen: ") and words in message


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shardgen(["--help"])
    assert "Exit codes: 0 done" in capsys.readouterr().out


def test_two_builds_never_share_a_folder(
    tiny_recipe: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_in(tiny_dataset):
        assert shardgen(["build", str(tiny_recipe)]) == 2
    assert "another build is at work" in capsys.readouterr().err


def test_another_recipe_in_the_same_folder_is_refused(
    tiny_recipe: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = shard_bytes(tiny_dataset)
    assert shardgen(["build", str(tiny_recipe), "--set", "prompt.stt=true"]) == 2
    assert "a shard never changes" in capsys.readouterr().err
    assert shard_bytes(tiny_dataset) == before


def test_a_second_run_does_nothing(tiny_dataset: Path, tiny_recipe: Path) -> None:
    before = tree_state(tiny_dataset)
    assert shardgen(["build", str(tiny_recipe)]) == 0
    after = tree_state(tiny_dataset)
    catalog = {
        name for name in (*before, *after) if "catalog.sqlite" in name or name == str(tiny_dataset)
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
            _, messages = process.communicate(timeout=60)
            assert process.returncode in (0, 2)
            assert process.returncode == 0 or (
                "run the build again" in messages and "Traceback" not in messages
            )
        else:
            process.kill()
            process.communicate(timeout=60)
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
                result = work(job)
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
    old = next(corpus.glob("video/*/2400101.json"))
    old.with_name("2400199.json").write_text(old.read_text().replace("2400101", "2400199"))
    media = old.with_suffix(".mp4").read_bytes()
    # an empty box: other bytes, the same pictures
    old.with_name("2400199.mp4").write_bytes(media + b"\0\0\0\x08free")
    before = shard_bytes(output)
    lost = next(output.glob("train/*x9-000000.tar"))
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
        _, messages = process.communicate(timeout=300)
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
    assert (row.status, row.reason) == ("unavailable", "media_missing")
