"""What several test files share: one tiny checkpoint and one sample corpus per session, both
read-only by agreement.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

# kernels run on the CPU; triton reads this once, when it is first imported
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from trainer_runs import finish, small_run, start, with_validation

from shardgen.cli import main as shardgen
from tools.fake.checkpoint import write_tiny_checkpoint
from tools.fake.corpus import write_sample_corpus
from train.config import TrainConfig


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws does not depend on which tests this process has run before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan2.2-TI2V-5B of tiny dimensions in diffusers layout, seed 0."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of the other tiny models, by kind (tools.fake.checkpoint.KINDS), each made once."""

    @cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        write_tiny_checkpoint(folder, kind=kind)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus (image/ and video/ below it); corpus.expected.json lies beside it."""
    root = tmp_path_factory.mktemp("sample") / "corpus"
    write_sample_corpus(root)
    return root


TINY_RECIPE = """
output = "{output}"
[labels]
root = "{corpus}"
[filters]
min_caption_chars = 50
[windows]
buckets = ["160x96x9", "96x160x9", "160x96x1", "96x160x1"]
samples_per_shard = 8
[encode]
model = "{checkpoint}"
"""


@pytest.fixture(scope="session")
def tiny_recipe(
    tiny_checkpoint: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The configuration that tiny_dataset was built with, by one worker."""
    folder = tmp_path_factory.mktemp("dataset")
    path = folder / "tiny.toml"
    path.write_text(
        TINY_RECIPE.format(output=folder / "tiny", corpus=tiny_corpus, checkpoint=tiny_checkpoint)
    )
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tiny_recipe: Path) -> Path:
    """The sample corpus as shards: 160x96x9 and 96x160x9 video and images, train and val,
    read-only by agreement.
    """
    assert shardgen(["build", str(tiny_recipe)]) == 0
    return tiny_recipe.parent / "tiny"


@pytest.fixture(scope="session")
def run_config(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A small training run, without an output."""
    return small_run(tiny_checkpoint, tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def two_ranks(run_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that run on two ranks, never stopped; read-only by agreement."""
    output = tmp_path_factory.mktemp("two_ranks")
    finish(start(run_config, output, 2))
    return output


@pytest.fixture(scope="session")
def one_rank(run_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that run on one rank, never stopped; read-only by agreement."""
    output = tmp_path_factory.mktemp("one_rank")
    finish(start(run_config, output, 1))
    return output


@pytest.fixture(scope="session")
def validated_run(run_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The small run with four clips to train on and others to validate on."""
    return with_validation(run_config, tmp_path_factory.mktemp("both_splits"))
