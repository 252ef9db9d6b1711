"""What an evaluation needs of the host's memory does not follow the number of clips: one clip and
one latent at a time, and of all the others their features.
"""

import os
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor, nn

from loader.mp4 import encode_mp4
from tools.evaluate.clips import (
    BASE,
    CATEGORIES_FILE,
    REAL,
    REFERENCE_FILE,
    Kept,
    clips_of,
    write_variant,
)
from tools.evaluate.compare import Table, add_features, add_latents
from tools.evaluate.config import EvaluateConfig, FVDConfig, SetConfig
from tools.evaluate.evaluation_set import EvaluationSet, Prompt, read_set, write_set
from tools.evaluate.extractors import file_sha256
from tools.evaluate.result import Variant
from tools.evaluate.score import score

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


class Pooled(nn.Module):
    """I3D's signature, 384 features; learned nothing."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        # 3 x 2 x 8 x 8
        return torch.nn.functional.adaptive_avg_pool3d(x, (2, 8, 8)).flatten(1)


def write_evaluation(
    folder: Path,
    num_prompts: int,
    num_seeds: int,
    latent: tuple[int, ...],
    size_px: tuple[int, int],
) -> EvaluateConfig:
    """Everything that `generate` would leave, of synthetic clips of 16 frames."""
    random = np.random.default_rng(0)
    weights = folder / "pooled.pt"
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript, which is what I3D's file is
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Pooled()), str(weights))
    config = EvaluateConfig(
        output=str(folder / "evaluation"),
        model="",
        datasets=[""],
        candidates={"lora": ""},
        set=SetConfig(num_prompts=num_prompts, num_seeds=num_seeds),
        fvd=FVDConfig(
            weights=str(weights), sha256=file_sha256(weights), name="fd_pooled", size_px=32
        ),
    )
    config.folder.mkdir()
    prompts = [
        Prompt(f"{i:012x}", f"{i:032x}", f"{i}번 장면이다.", f"category {i % 4}", "", "", True)
        for i in range(num_prompts)
    ]
    chosen = EvaluationSet(prompts, num_seeds, 0, 2, 5.0, 5.0, "float32", [], hash="of the test")
    write_set(config.folder, chosen)
    frames = [random.integers(0, 256, (16, *size_px, 3), dtype=np.uint8) for _ in range(8)]
    mp4s = [encode_mp4(each, 24.0) for each in frames]
    for name in (REAL, BASE, "lora"):
        write_variant(config.folder, Variant(name))
        for number, clip in enumerate(clips_of(chosen, name)):
            (config.folder / clip.mp4).write_bytes(mp4s[number % len(mp4s)])
            noise = random.standard_normal(latent, np.float32).astype(np.float16)
            np.save(config.folder / clip.latent, noise)
            if name == REAL:
                kept = msgspec.json.encode(Kept("KEY.mp4", 30.0))
                (config.folder / clip.kept).write_bytes(kept)
    width = latent[0] * min(latent[1], 3) * min(latent[2], 6) * min(latent[3], 10)
    reference = random.standard_normal((num_prompts * num_seeds, width), np.float32)
    np.save(config.folder / REFERENCE_FILE, reference)
    categories = [f"category {i % 4}" for i in range(len(reference))]
    (config.folder / CATEGORIES_FILE).write_bytes(msgspec.json.encode(categories))
    return config


def test_a_few_clips_take_less_than_half_of_what_they_are_together(tmp_path: Path) -> None:
    config = write_evaluation(
        tmp_path, num_prompts=24, num_seeds=1, latent=(48, 13, 30, 26), size_px=(48, 64)
    )
    chosen = read_set(config.folder)
    assert chosen is not None
    table = Table(config, chosen)
    num_bytes = 3 * 24 * (48 * 13 * 30 * 26 * 2 + 16 * 48 * 64 * 3)
    tracemalloc.start()
    try:
        scores = score(config, chosen, torch.device("cpu"))
        add_latents(table)
        add_features(table, scores)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    found = {m.name for m in table.metrics if m.variant == "lora" and m.n == 24}
    assert found == {"latent_frechet", "latent_retrieval", "fd_pooled", "fd_pooled_kernel"}
    assert peak_bytes < num_bytes / 2


@pytest.mark.soak
def test_two_thousand_clips_are_scored_in_less_than_four_gib(tmp_path: Path) -> None:
    """2,048 of each variant, with latents of as many features as those of any larger shape."""
    config = write_evaluation(
        tmp_path, num_prompts=512, num_seeds=4, latent=(48, 3, 6, 10), size_px=(48, 64)
    )
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(msgspec.to_builtins(config)), encoding="utf-8")
    for command in ("score", "compare"):
        arguments = [sys.executable, "-m", "tools.evaluate", command, str(path)]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak_gib = usage.ru_maxrss * 1024 / GIB
        print(f"{command}: {peak_gib:.2f} GiB at the peak, {usage.ru_utime:.0f} s of a core")
        assert process.returncode == 0 and peak_gib < 4
