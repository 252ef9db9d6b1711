"""What several test files share: one tiny checkpoint and one sample corpus per session, both read-only by agreement."""

from pathlib import Path

import pytest

from tools.sample_corpus import write_sample_corpus
from tools.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan2.2-TI2V-5B of tiny dimensions in diffusers layout, seed 0."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample corpus (image/ and video/ below it); corpus.expected.json lies beside it."""
    root = tmp_path_factory.mktemp("sample") / "corpus"
    write_sample_corpus(root)
    return root
