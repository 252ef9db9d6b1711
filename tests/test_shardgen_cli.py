"""The command line: stages, exit codes, and a user's faults in one line that names the remedy."""

import errno
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from loader.exclusions import EXCLUDE, Exclusion, write_exclusions
from loader.manifest import read_manifest
from shardgen.build import alone_in
from shardgen.catalog.catalog import Catalog
from shardgen.cli import main as shardgen
from shardgen.media.probe import probe


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
            "UPDATE clips SET status = 'unavailable', reason = 'cache_full' "
            "WHERE clip_id = '2400101'"
        )
    assert shardgen(command) == 1
    assert "1 clips wait for room" in capsys.readouterr().out


def test_user_faults_are_one_line_and_exit_2(
    tiny_recipe: Path, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, words in [
        (["output=" + str(tiny_corpus / "out")], "choose a folder outside"),
        (["output=/proc/newsreel"], "/proc/newsreel"),
        ([f"fetch.cache={tiny_corpus / 'cache'}"], "choose a folder outside"),
        # a slip of the shell's, not the folder one stands in
        (["output="], "length >= 1 - at `$.output`"),
        (["labels.root="], "length >= 1 - at `$.labels.root`"),
        (["labels.root=/nowhere"], "no such folder"),
        (["windows.fps=0"], "> 0.0 - at `$.windows.fps`"),
        (["encode.threads=0"], "$.encode.threads"),
        (["fetch.timeout_s=inf"], "$.fetch.timeout_s"),
        (["labels.limit=-1"], "$.labels.limit"),
        (["split.group_by=[]"], "split.group_by is empty"),
        (["nonsense=1"], "known keys"),
        ([f"output={tmp_path / 'out'}", "encode.model=/nowhere"], "diffusers"),
        ([f"output={tiny_recipe}/out"], "Not a directory; a file stands where a folder is needed"),
        ([f"output={tiny_recipe}"], f"{tiny_recipe}: File exists; a file stands where a folder"),
        ([f"labels.exclusions={tmp_path / 'none.csv'}"], "can't read the exclusions"),
        (["encode.device=gpu"], "$.encode.device"),
    ]:
        arguments = [part for override in overrides for part in ("--set", override)]
        assert shardgen(["build", str(tiny_recipe), *arguments]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("shardgen: ") and words in message


def test_ctrl_c_waits_for_nothing_that_is_at_work(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    in_time = []

    def interrupted_build(_: object) -> int:
        with ThreadPoolExecutor(1) as pool:
            download = pool.submit(ended.wait, 5)
            os.kill(os.getpid(), signal.SIGINT)
            in_time.append(download)
        return 0

    def end(code: int) -> None:
        ended.set()

    monkeypatch.setattr("shardgen.cli.run_build", interrupted_build)
    monkeypatch.setattr(os, "_exit", end)
    # a shell that starts the tests in the background has them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            shardgen(["build", str(tiny_recipe)])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert in_time and in_time[0].result()
    assert "interrupted; what was finished stands" in capsys.readouterr().err


def test_ctrl_c_shuts_a_ray_cluster_down(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []

    def interrupted_build(_: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            events.append("shut down")
        return 0

    monkeypatch.setattr("shardgen.cli.run_build", interrupted_build)
    monkeypatch.setattr(os, "_exit", events.append)
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        shardgen(["build", str(tiny_recipe)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert events == ["shut down", 130]


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
    before = {path: path.read_bytes() for path in tiny_dataset.glob("*/*.tar")}
    assert before
    assert shardgen(["build", str(tiny_recipe), "--set", "prompt.stt=true"]) == 2
    assert "a shard never changes" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tiny_dataset.glob("*/*.tar")} == before


def test_without_a_gpu_cuda_is_refused_before_anything_is_written(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["build", str(tiny_recipe), "--set", f"output={tmp_path / 'out'}"]
    assert shardgen([*command, "--set", "encode.device=cuda"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith('shardgen: encode.device = "cuda": no GPU can be used here')
    assert 'set encode.device = "cpu"' in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_more_workers_than_gpus_are_refused_before_anything_is_written(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    command = ["build", str(tiny_recipe), "--set", f"output={tmp_path / 'out'}", "--workers", "2"]
    assert shardgen([*command, "--set", "encode.device=cuda"]) == 2
    assert "set executor.workers = 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_try_that_failed_leaves_a_folder_for_the_command_that_is_put_right(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan is made and, as by a killed build, a shard and the empty prompt lie there."""
    command = ["build", str(tiny_recipe), "--set", f"output={tmp_path}", "--stage", "plan"]
    assert shardgen([*command, "--set", "encode.dtype=float16"]) == 0
    with Catalog(tmp_path / "catalog.sqlite") as catalog:
        name = catalog.shards.unfinished()[0]
        split = catalog.shards.plan(name).split
    (tmp_path / split).mkdir()
    for file in (f"{split}/{name}.tar", f"{split}/{name}.idx", "empty_prompt.text.zst"):
        (tmp_path / file).write_bytes(b"of the first try")
    capsys.readouterr()
    assert shardgen(command) == 0
    assert "accepted" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/*.tar")) and not list(tmp_path.glob("*.zst"))


def test_a_label_root_without_labels_is_exit_2_and_no_manifest(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels" / "video").mkdir(parents=True)
    overrides = ["--set", f"labels.root={tmp_path / 'labels'}", "--set", f"output={tmp_path / 'o'}"]
    assert shardgen(["build", str(tiny_recipe), *overrides]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("shardgen: labels.root = ") and "no label file" in message
    assert not (tmp_path / "o" / "manifest.json").exists()


@pytest.mark.parametrize("stage", ["plan", "report"])
def test_rules_that_nothing_passes_are_exit_2_and_the_counts_say_why(
    stage: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["--set", "filters.min_caption_chars=100000", "--set", f"output={tmp_path}"]
    assert shardgen(["build", str(tiny_recipe), *overrides, "--stage", stage]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("shardgen: none of 42 label files gives a sample")
    assert "rejected: caption_short 3" in message and "unreadable: label_not_json 1" in message
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "defective_samples.csv").is_file() == (stage == "report")
    assert not list(tmp_path.glob("*.zst"))


def test_excluded_labels_of_a_recipe_get_their_reason_and_the_recipe_stays_the_same(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exclusions = tmp_path / "exclusions.csv"
    rows = [Exclusion("video/batch_0001/2400101.json", EXCLUDE), Exclusion("x.json", EXCLUDE)]
    write_exclusions(exclusions, rows)
    output = tmp_path / "out"
    command = ["build", str(tiny_recipe), "--set", f"output={output}", "--stage", "filter"]
    assert shardgen(command) == 0
    with Catalog.open_read_only(output / "catalog.sqlite") as catalog:
        recipe = catalog.database.recall("recipe_id")
    capsys.readouterr()
    assert shardgen([*command, "--set", f"labels.exclusions={exclusions}"]) == 0
    assert "1 of 2 excluded labels name no label file" in capsys.readouterr().out
    with Catalog.open_read_only(output / "catalog.sqlite") as catalog:
        (clip,) = catalog.claims("2400101")
        assert (clip.status, clip.reason) == ("rejected", "excluded_by_review")
        assert catalog.database.recall("recipe_id") == recipe


def test_another_folder_keeps_what_the_first_one_has_fetched_and_probed(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["build", str(tiny_recipe), "--stage", "probe", "--set"]
    assert shardgen([*command, f"output={first}"]) == 0

    def probe_again(path: Path) -> None:
        probe(path)
        raise AssertionError(f"{path}: was sound before")

    monkeypatch.setattr("shardgen.stages.fetch.hash_local", None)
    # what failed before is tried again
    monkeypatch.setattr("shardgen.stages.probe.probe", probe_again)
    assert shardgen([*command, f"output={second}", "--set", f"fetch.reuse={first}"]) == 0
    catalogs = [Catalog.open_read_only(folder / "catalog.sqlite") for folder in (first, second)]
    counts = []
    for catalog in catalogs:
        with catalog:
            counts.append([each for each in catalog.status_counts() if each.status == "sound"])
    assert counts[0] == counts[1] != []


def test_a_build_flags_footage_that_was_replaced_since(
    tiny_recipe: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(tiny_corpus, root)
    command = ["build", str(tiny_recipe), "--set", f"labels.root={root}"]
    command += ["--set", f"output={output}", "--stage"]
    assert shardgen([*command, "plan"]) == 0
    with Catalog.open_read_only(output / "catalog.sqlite") as catalog:
        clip = next(clip for clip in catalog.clips("accepted") if clip.media_type == "video")
    with (root / clip.label).with_suffix(".mp4").open("ab") as file:
        file.write(bytes(8))
    assert shardgen([*command, "fetch"]) == 0
    with Catalog.open_read_only(output / "catalog.sqlite") as catalog:
        flagged = [row.label for row in catalog.clips("accepted") if "media_changed" in row.flags]
    assert flagged == [clip.label]


def test_an_error_of_the_disk_names_the_file_and_the_remedy(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert shardgen(["build", str(tiny_recipe), "--set", f"output={tmp_path}"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == (
        f"shardgen: {tmp_path / 'config.toml'}: No space left on device; free some space and run "
        f"the same command, what was finished stands"
    )
