"""What I2V-A14B is given beside the noised latent: the first frame and grey ones after it, encoded
once more; and which windows a model's dataset may have.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from shard_jobs import BUCKET, job_for, spec_for, window
from stage_runs import config_of, mp4

from loader.files import file_xxh3, write_atomic
from loader.manifest import MANIFEST_FILE, decode_index, encode_manifest, make_manifest
from loader.models import FIRST_FRAME_AND_GREY, ModelError
from loader.sample import EMPTY_PROMPT_FILE, decode_meta, decode_tensor, encode_tensor
from loader.shape import WAN21
from shardgen.config import ShardgenConfig, check_model, recipe_of
from shardgen.encode.config import EncodeConfig
from shardgen.encode.shard import encode_shard
from shardgen.media.decode import decode_window
from shardgen.rules.config import WindowsConfig
from shardgen.verify import verify_dataset

TinyModel = Callable[[str], Path]


def pixels_of(frames: np.ndarray) -> torch.Tensor:
    """uint8 [F, H, W, 3] -> float32 [1, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, 0)[None].float() / 127.5 - 1


def test_the_condition_is_diffusers_encoding_and_its_frame_0_is_the_latents_bit_for_bit(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("i2v-a14b")
    rng = np.random.default_rng(0)
    clip, out = tmp_path / "clip.mp4", tmp_path / "out"
    clip.write_bytes(mp4(24, shade=int(rng.integers(30, 200))))
    media = {file_xxh3(clip): str(clip)}
    windows = [window(next(iter(media)), f"{start}", start) for start in (0, 300, 500)]
    spec = spec_for(model, out, condition=FIRST_FRAME_AND_GREY)
    result = encode_shard(job_for(windows, media), spec)
    assert result.info is not None
    stem = out / "train" / result.name
    data = stem.with_suffix(".tar").read_bytes()
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae").requires_grad_(False)
    mean, std = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    starts = {planned.key: planned.start_ms for planned in windows}
    for members in decode_index(stem.with_suffix(".idx").read_bytes(), result.name):
        stored = {m.name.partition(".")[2]: data[m.offset : m.offset + m.size] for m in members}
        assert list(stored) == ["json", "latent.zst", "condition.zst", "text.zst", "jpg"]
        meta = decode_meta(stored["json"])
        assert meta.latent.shape == WAN21.latent_shape(BUCKET)
        latent, given = (
            decode_tensor(stored[name], meta.latent) for name in ("latent.zst", "condition.zst")
        )
        assert np.array_equal(latent[:, 0], given[:, 0])
        assert not np.array_equal(latent[:, 1], given[:, 1])
        pixels_BCFHW = pixels_of(decode_window(clip, starts[meta.key], 24.0, BUCKET))
        pixels_BCFHW[:, :, 1:] = 0
        expected = (vae.encode(pixels_BCFHW).latent_dist.mode() - mean) / std
        # half a step of float16 at the largest value
        assert np.abs(given - expected[0].numpy()).max() < 2**-11 * np.abs(given).max() + 1e-5

    # a dataset with it verifies, and one that lacks it does not
    write_atomic(out / EMPTY_PROMPT_FILE, encode_tensor(np.ones((1, 32), np.float16)))
    for name, num_faults in ((FIRST_FRAME_AND_GREY, 0), ("", 0)):
        manifest = make_manifest({}, {"train": [result.info]}, layout=WAN21, condition=name)
        write_atomic(out / MANIFEST_FILE, encode_manifest(manifest))
        assert len(list(verify_dataset(out, 1, lambda _: None))) == num_faults
    plain = encode_shard(job_for(windows, media, number=1), spec_for(model, out)).info
    assert plain is not None
    manifest = make_manifest({}, {"train": [plain]}, layout=WAN21, condition=FIRST_FRAME_AND_GREY)
    write_atomic(out / MANIFEST_FILE, encode_manifest(manifest))
    for suffix in (".tar", ".idx", ".xxh3"):
        stem.with_suffix(suffix).unlink()
    faults = list(verify_dataset(out, 1, lambda _: None))
    assert len(faults) == 3 and all("has no member condition.zst" in fault for fault in faults)


def with_model(model: Path, *buckets: str, fps: float, condition: str = "") -> ShardgenConfig:
    return config_of(
        Path("labels"),
        windows=WindowsConfig(buckets=buckets, fps=fps),
        encode=msgspec.convert({"model": str(model), "condition": condition}, EncodeConfig),
    )


def test_windows_that_the_model_does_not_take_are_refused_before_the_build(
    tiny_checkpoint: Path, tiny_model: TinyModel
) -> None:
    t2v, i2v = tiny_model("t2v-a14b"), tiny_model("i2v-a14b")
    assert check_model(with_model(t2v, "1280x720x49", "1280x720x1", fps=16.0)) == WAN21
    with pytest.raises(ValueError, match="the next smaller shape is 1280x704x49"):
        check_model(with_model(tiny_checkpoint, "1280x720x49", fps=24.0))
    with pytest.raises(ValueError, match=r"windows.fps = 24, where .*T2V-A14B.* learn at 16"):
        check_model(with_model(t2v, "1280x720x49", fps=24.0))
    with pytest.raises(ValueError, match=r"windows.fps = 16, where Wan2.2-TI2V-5B learn at 24"):
        check_model(with_model(tiny_checkpoint, "64x64x9", fps=16.0))
    with pytest.raises(ValueError, match=r'set encode.condition = "first_frame_and_grey"'):
        check_model(with_model(i2v, "64x64x9", fps=16.0))
    given = FIRST_FRAME_AND_GREY
    with pytest.raises(ValueError, match="64x64x1, a shape of images"):
        check_model(with_model(i2v, "64x64x9", "64x64x1", fps=16.0, condition=given))
    with pytest.raises(ValueError, match=r"is for Wan2.2-I2V-A14B; .* is Wan2.2-TI2V-5B"):
        check_model(with_model(tiny_checkpoint, "64x64x9", fps=24.0, condition=given))
    assert check_model(with_model(i2v, "64x48x9", fps=16.0, condition=given)) == WAN21
    with pytest.raises(ModelError, match=r"vae/config.json"):
        check_model(with_model(Path("nowhere"), "64x64x9", fps=24.0))


def test_a_recipe_without_a_condition_is_what_it_was(tiny_checkpoint: Path) -> None:
    config = with_model(tiny_checkpoint, "64x64x9", fps=24.0)
    assert "condition" not in recipe_of(config)["encode"]
    given = with_model(tiny_checkpoint, "64x64x9", fps=24.0, condition=FIRST_FRAME_AND_GREY)
    assert recipe_of(given)["encode"]["condition"] == FIRST_FRAME_AND_GREY
