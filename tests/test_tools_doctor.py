"""tools.doctor names what is in the way, says what to do, and never stops at the first fault."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from loader.feed_config import FeedConfig
from tools.doctor import cards, host, run, step
from tools.doctor.__main__ import HOST_CHECKS, main
from tools.doctor.finding import Finding, guarded
from tools.doctor.room import run_bytes
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.model.config import ModelConfig
from train.validate import ValidationConfig


def config(model: Path, dataset: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        output=str(output),
        model=ModelConfig(path=str(model), dtype="float32"),
        data=FeedConfig(datasets=[str(dataset)]),
        num_steps=1,
        global_batch=1,
    )


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "dataset"))


def test_an_intact_dataset_is_ok(tiny_dataset: Path, tmp_path: Path) -> None:
    (finding,) = run.datasets(config(tmp_path, tiny_dataset, tmp_path))
    assert finding.status == "ok" and "samples" in finding.text


def test_a_flipped_byte_in_a_shard_is_found(dataset: Path, tmp_path: Path) -> None:
    tar = sorted((dataset / "train").glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first member
    tar.write_bytes(data)
    (finding,) = run.datasets(config(tmp_path, dataset, tmp_path))
    assert finding.status == "failure" and tar.name in finding.text
    assert finding.advice == f"shardgen verify {dataset}"


@pytest.mark.parametrize("suffix", [".tar", ".idx", ".xxh3"])
def test_a_missing_file_of_a_shard_is_named(dataset: Path, tmp_path: Path, suffix: str) -> None:
    path = sorted((dataset / "train").glob(f"*{suffix}"))[-1]
    path.unlink()
    (finding,) = run.datasets(config(tmp_path, dataset, tmp_path))
    assert finding.status == "failure" and path.name in finding.text


def test_missing_model_files_are_named_with_the_command_that_fetches_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    weights = min((model / "transformer").glob("*.safetensors"))
    weights.unlink()
    shutil.rmtree(model / "vae")
    findings = {f.name: f for f in run.model_files(config(model, tmp_path, tmp_path))}
    transformer, vae = findings["model transformer"], findings["model vae"]
    assert transformer.status == "failure" and "safetensors" in transformer.text
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in transformer.advice
    # training from stored latents does not read the VAE
    assert vae.status == "warning" and "config.json" in vae.text
    assert findings["model tokenizer"].status == "ok"


def test_of_two_experts_the_trained_one_is_required(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model("t2v-a14b"), tmp_path / "model"))
    shutil.rmtree(model / "transformer_2")
    for expert, status in (("high", "warning"), ("low", "failure")):
        table = msgspec.convert({"path": str(model), "expert": expert}, ModelConfig)
        changed = msgspec.structs.replace(config(model, tmp_path, tmp_path), model=table)
        findings = {f.name: f for f in run.model_files(changed)}
        assert findings["model transformer"].status == "ok"
        assert findings["model transformer_2"].status == status
        assert "Wan-AI/Wan2.2-T2V-A14B-Diffusers" in findings["model transformer_2"].advice


def test_what_is_missing_is_fetched_of_the_model_whose_other_expert_is_there(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model("i2v-a14b"), tmp_path / "model"))
    shutil.rmtree(model / "transformer")
    (model / "model_index.json").unlink()
    table = msgspec.convert({"path": str(model), "expert": "high"}, ModelConfig)
    changed = msgspec.structs.replace(config(model, tmp_path, tmp_path), model=table)
    findings = {f.name: f for f in run.model_files(changed)}
    assert "Wan-AI/Wan2.2-I2V-A14B-Diffusers" in findings["model transformer"].advice
    assert findings["model index"].status == "failure"
    assert "Wan2.2-I2V-A14B-Diffusers model_index.json" in findings["model index"].advice


@pytest.mark.parametrize(("num_layers", "size"), [(30, "1.3B"), (40, "14B")])
def test_what_is_missing_of_wan21_is_fetched_of_its_own_size(
    num_layers: int, size: str, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    text = json.dumps({"in_channels": 16, "num_layers": num_layers})
    (tmp_path / "transformer" / "config.json").write_text(text)
    findings = {f.name: f for f in run.model_files(config(tmp_path, tmp_path, tmp_path))}
    for name in ("model transformer", "model vae", "model index"):
        assert f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" in findings[name].advice


def test_a_sharded_folder_is_held_to_its_own_index(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    (folder / "part-1.safetensors").write_bytes(b"")
    findings = {f.name: f for f in run.model_files(config(tmp_path, tmp_path, tmp_path))}
    assert "part-2.safetensors missing" in findings["model transformer"].text


def test_a_package_outside_its_range_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.1" if name == "diffusers" else real(name)
    )
    (finding,) = host.packages()
    assert finding.status == "failure" and "diffusers 0.1 is not" in finding.text


def test_what_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    for check in (host.interpreter, host.packages, host.bitsandbytes):
        (finding,) = guarded("name", check)
        assert finding.status != "ok" and "not installed" in finding.text
        assert "tools/install.sh" in finding.advice


def test_a_check_that_breaks_off_is_a_failure_and_the_others_go_on() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", "ok", "before the fault")
        raise OSError("no such device")

    findings = list(guarded("gpu", broken))
    assert [f.status for f in findings] == ["ok", "failure"]
    assert "OSError: no such device" in findings[1].text


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    (finding,) = run.disk(config(tmp_path, tmp_path, tmp_path / "runs" / "new"))
    assert "MB/s" in finding.text and list(tmp_path.iterdir()) == []


def test_a_step_is_timed_with_the_runs_own_model_and_shape(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    (finding,) = step.one_step(config(tiny_checkpoint, tiny_dataset, tmp_path))
    assert finding.status == "ok" and "random weights" not in finding.text
    assert finding.text.startswith(("160x96x9 x 1 (its largest shape) in ", "96x160x9 x 1 (its"))
    assert "attention" in finding.text and "loss " in finding.text


def test_without_weights_a_step_of_random_ones_is_timed_and_without_a_gpu_none_of_5b(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model" / "transformer"
    model.mkdir(parents=True)
    shutil.copy(tiny_checkpoint / "transformer" / "config.json", model)
    (finding,) = step.one_step(config(model.parent, tiny_dataset, tmp_path))
    assert finding.status == "ok" and "with random weights" in finding.text
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = step.one_step(config(tmp_path / "absent", tiny_dataset, tmp_path))
    assert finding.status == "skipped" and "no GPU, and 5.0e9 parameters" in finding.text


def test_weights_that_give_no_finite_loss_are_a_failure(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    path = min((model / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    (finding,) = step.one_step(config(model, tiny_dataset, tmp_path))
    assert finding.status == "failure" and "loss nan" in finding.text and finding.advice


def test_the_room_of_a_run_grows_with_its_rank_and_its_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(config(tmp_path, tmp_path, tmp_path), num_steps=64_852)
    high = replace(one, lora=replace(one.lora, rank=64), validation=ValidationConfig(every=1000))
    # TI2V-5B's six q, k, v of rank 64: 70.8 million parameters, two files of them each time
    files = 66 * 2 * 4 * 70_778_880
    assert files < run_bytes(high) < files + 12 * 2**30
    half = replace(high, checkpoint=CheckpointConfig(lora_dtype="bfloat16"))
    assert run_bytes(half) < 0.6 * run_bytes(high)
    assert run_bytes(one) < run_bytes(high)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10 * 2**30))
    (finding,) = run.disk(high)
    assert finding.status == "warning" and "10 GiB free, the run takes 4" in finding.text
    assert 'checkpoint.lora_dtype = "bfloat16"' in finding.advice


def test_cards_that_never_answer_each_other_are_a_failure_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_command = cards._run
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(cards, "_run", lambda _, environment: run_command(hangs, environment))
    monkeypatch.setattr(cards, "REDUCE_S", 0.2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with_p2p, without = cards.all_reduce()
    assert (with_p2p.status, without.status) == ("failure", "failure")
    assert with_p2p.text == "Error: no answer in 0.2 s"
    assert with_p2p.advice == "export NCCL_P2P_DISABLE=1" != without.advice


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checks of the host that start no processes."""
    for name in ("imports", "bitsandbytes", "DALI"):
        monkeypatch.delitem(HOST_CHECKS, name)


@pytest.mark.usefixtures("quick")
def test_without_a_gpu_the_checks_of_cards_are_skipped_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--json"]) == 0
    findings = msgspec.json.decode(capsys.readouterr().out, type=list[Finding])
    skipped = {finding.name for finding in findings if finding.status == "skipped"}
    assert {"gpu", "host to device", "all-reduce", "video engines"} <= skipped


@pytest.mark.usefixtures("quick")
def test_exit_codes_tell_a_failure_from_a_wrong_call(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    assert main([str(path)]) == 2
    path.write_text(
        f'output = "{tmp_path / "run"}"\nnum_steps = 1\nglobal_batch = 1\n'
        f'[model]\npath = "{tiny_checkpoint}"\n[data]\ndatasets = ["{tmp_path / "absent"}"]\n'
    )
    assert main([str(path)]) == 1
    assert "FAILURE  dataset" in capsys.readouterr().out
