"""tools.plan answers for no run that the trainer would refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import plan
from tools.fake.batch import write_synthetic_dataset


def planned(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> None:
    """Plan a run of one dataset in `folder`. Raises SystemExit where it is refused."""
    write_synthetic_dataset(folder, {"64x64x5": 4}, text_dim=64)
    file = folder / "run.toml"
    file.write_text(
        f'output = "o"\nnum_steps = 1\nglobal_batch = 2\n[model]\npath = "{checkpoint}"\n'
        f'[data]\ndatasets = ["{folder}"]\n[lora]\nrank = 8\n'
    )
    monkeypatch.setattr("sys.argv", ["plan", str(file), *arguments])
    plan.main()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ['model.attention="math"', 'activation_memory="1GiB"'],
            r'activation_memory = "1GiB": attention = "math" is many',
        ),
        (["samples.every=5", 'samples.shape="100x100x5"'], "the next smaller shape is 96x96x5"),
        (['flow.shifts={"96x96x5" = 2.0}'], "flow.shifts: 96x96x5 is no shape of the datasets"),
        (["lora.init={folder}/run.toml"], "run.toml"),
        (["model.expert=high"], "is one transformer"),
    ],
)
def test_what_the_trainer_refuses_is_refused(
    changes: list[str],
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        part for change in changes for part in ("--set", change.replace("{folder}", str(tmp_path)))
    ]
    with pytest.raises(SystemExit, match=said):
        planned(tiny_checkpoint, tmp_path, monkeypatch, *arguments)


def test_a_dataset_of_another_model_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="its latents have 48 channels"):
        planned(tiny_model("wan2.1-t2v"), tmp_path, monkeypatch, "--set", "data.i2v_share=0.0")


def test_a_run_that_can_be_trained_is_planned(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # its weights may be on another machine, and what it starts from
    planned(tiny_checkpoint, tmp_path, monkeypatch, "--set", "lora.init=/nowhere.safetensors")
    printed = capsys.readouterr().out
    assert "2 batches of 2 an epoch" in printed and "memory of one GPU" in printed
