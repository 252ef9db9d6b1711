"""How long a run is, in steps or in epochs of its datasets; what may change on resume."""

from pathlib import Path

import msgspec
import pytest
import torch
from trainer_runs import records, train_here

from loader.config import ConfigError, dump_toml, load_toml
from loader.exclusions import Exclusion, write_exclusions
from loader.feed_config import FeedConfig
from loader.sample import JSON
from loader.shard import open_shard, read_members
from loader.store import read_dataset
from tools import budget, plan
from tools.fake.batch import write_synthetic_dataset
from train import setup
from train.config import TrainConfig, defaults, in_steps, resumable_changes
from train.parallel.mesh import World
from train.records import read_status

MINIMAL = 'output = "o"\nglobal_batch = 2\n[model]\npath = "m"\n[data]\ndatasets = ["d"]\n'


@pytest.mark.parametrize("lines", ["", "num_steps = 4\nnum_epochs = 1\n", "num_epochs = 0\n"])
def test_steps_or_epochs_are_given_and_never_both(tmp_path: Path, lines: str) -> None:
    (tmp_path / "run.toml").write_text(lines + MINIMAL)
    with pytest.raises(ConfigError, match=r"num_epochs = [01]: give one of them"):
        load_toml(tmp_path / "run.toml", TrainConfig)
    (tmp_path / "run.toml").write_text("num_epochs = 3\n" + MINIMAL)
    assert load_toml(tmp_path / "run.toml", TrainConfig).num_epochs == 3


def test_an_output_without_a_name_is_not_the_folder_that_one_is_in(tmp_path: Path) -> None:
    """As `--set output=$OUTPUT` says where nobody has set it."""
    (tmp_path / "run.toml").write_text("num_steps = 4\n" + MINIMAL)
    with pytest.raises(ConfigError, match=r"with --set output=\): Expected `str` of length >= 1"):
        load_toml(tmp_path / "run.toml", TrainConfig, ["output="])


def label_of_first_sample(dataset: Path) -> str:
    store, manifest = read_dataset(str(dataset))
    shard = open_shard(store, "train", manifest.splits["train"][0])
    return str(msgspec.json.decode(read_members(shard, 0, [JSON])[JSON])["label"])


def test_an_epoch_is_the_whole_batches_of_all_datasets_for_the_trainer_and_the_plan(
    run_config: TrainConfig, tmp_path: Path
) -> None:
    for name, buckets in (("a", {"64x64x1": 4, "96x64x9": 5}), ("b", {"64x64x1": 7})):
        write_synthetic_dataset(tmp_path / name, buckets)
    excluded = Exclusion(label_of_first_sample(tmp_path / "a"), "exclude")
    write_exclusions(tmp_path / "exclusions.csv", [excluded])
    names = [str(tmp_path / name) for name in "ab"]
    epochs = msgspec.structs.replace(run_config, num_steps=0, num_epochs=3)
    # batches of two: 2 + 2 and 3; without one of the four images of a, one batch less
    for exclude, num_batches in ([], 7), ([str(tmp_path / "exclusions.csv"), ""], 6):
        data = FeedConfig(datasets=names, exclude=exclude, num_threads=1)
        config = msgspec.structs.replace(epochs, data=data)
        with setup.open_feed(config, World(0, 1, torch.device("cpu"))) as feed:
            assert feed.num_batches_per_epoch == num_batches
        assert sum(budget.order_of(config).batches_per_epoch) == num_batches
        in_steps_ = in_steps(config, num_batches)
        assert (in_steps_.num_steps, in_steps_.num_epochs) == (3 * num_batches, 0)
    assert in_steps(run_config, 7) == run_config


def test_a_run_of_epochs_is_one_of_steps(run_config: TrainConfig, tmp_path: Path) -> None:
    """The small run's 16 samples are 8 batches of two."""
    train_here(run_config, tmp_path, num_steps=0, num_epochs=1)
    assert [record.step for record in records(tmp_path)] == list(range(1, 9))
    status = read_status(tmp_path)
    assert status is not None and (status.step, status.num_steps) == (8, 8)
    resolved = load_toml(tmp_path / "config.toml", TrainConfig)
    assert (resolved.num_steps, resolved.num_epochs) == (8, 0)
    # and so it goes on from its checkpoint
    train_here(run_config, tmp_path, num_steps=0, num_epochs=1)


def test_only_with_a_constant_rate_the_length_may_change(run_config: TrainConfig) -> None:
    for schedule, changes in (("constant", True), ("cosine", False)):
        optim = msgspec.structs.replace(run_config.optim, schedule=schedule)
        config = msgspec.structs.replace(run_config, optim=optim)
        assert ("num_steps" in resumable_changes(config, is_validated=True)) is changes


def test_a_table_of_shifts_is_read_and_echoed(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("num_steps = 3\n" + MINIMAL + '[flow.shifts]\n"832x480x9" = 3.0\n')
    config = load_toml(path, TrainConfig, ["flow.shift=5.0"])
    assert config.flow.shifts == {"832x480x9": 3.0} and config.flow.shift == 5.0
    path.write_text(dump_toml(config))
    assert load_toml(path, TrainConfig) == config
    with pytest.raises(ConfigError, match=r"flow\.shifts"):
        load_toml(path, TrainConfig, ['flow.shifts={"832x480x9"=0.0}'])


def test_what_is_trained_and_what_is_exported_may_not_change_on_resume(
    run_config: TrainConfig,
) -> None:
    changeable = resumable_changes(run_config, is_validated=False)
    flow = {f"flow.{key}" for key in ("shifts", "weighting", "timesteps")}
    optim = {f"optim.{key}" for key in ("ema", "lora_plus_ratio", "schedule", "lr")}
    assert flow | optim <= defaults().keys() and not changeable & (flow | optim)


def test_the_plan_counts_the_steps_of_the_epochs(
    run_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = msgspec.structs.replace(run_config.lora, rank=8)
    config = msgspec.structs.replace(run_config, output="o", lora=lora, num_steps=0, num_epochs=3)
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(config))
    for more in ([], ["--shape", "96x64x9"]):
        monkeypatch.setattr("sys.argv", ["plan", str(path), "--gpus", "1", *more])
        plan.main()
        assert "24 steps of 2 samples on 1 GPU(s)" in capsys.readouterr().out
