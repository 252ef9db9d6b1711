"""The tiny checkpoint is a Wan2.2-TI2V-5B folder: diffusers loads it whole, generates with it,
and finds it alive.
"""

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import AutoTokenizer

from tools.fake.checkpoint import write_tiny_checkpoint

PROMPT = "커다란 토끼가 풀밭에 서서 나비를 바라본다."


def _generate(
    pipeline: WanPipeline | WanImageToVideoPipeline, prompt: str, **options: object
) -> np.ndarray:
    frames: np.ndarray = pipeline(
        prompt=prompt,
        width=64,
        height=64,
        num_frames=5,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).frames
    return frames


def test_text_to_video_generates_and_depends_on_the_prompt(tiny_checkpoint: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.expand_timesteps and pipeline.config.boundary_ratio is None
    frames = _generate(pipeline, PROMPT)
    assert frames.shape == (1, 5, 64, 64, 3)
    assert np.isfinite(frames).all() and frames.std() > 0.05
    assert np.abs(frames - _generate(pipeline, "The camera pans left.")).mean() > 1e-3


def test_image_to_video_generates_and_depends_on_the_image(tiny_checkpoint: Path) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    grey, ramp = (
        Image.new("RGB", (64, 64), "grey"),
        Image.linear_gradient("L").resize((64, 64)).convert("RGB"),
    )
    frames = _generate(pipeline, PROMPT, image=grey)
    assert frames.shape == (1, 5, 64, 64, 3)
    assert np.abs(frames - _generate(pipeline, PROMPT, image=ramp)).mean() > 1e-3


def test_latents_and_predictions_are_near_unit_variance(tiny_checkpoint: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    config = pipeline.vae.config
    generator = torch.Generator().manual_seed(0)
    video_BCTHW = torch.rand(1, 3, 9, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        mean_BCTHW = pipeline.vae.encode(video_BCTHW).latent_dist.mode()
        latent_BCTHW = (
            mean_BCTHW - torch.tensor(config.latents_mean).view(1, 48, 1, 1, 1)
        ) / torch.tensor(config.latents_std).view(1, 48, 1, 1, 1)
        velocity_BCTHW = pipeline.transformer(
            latent_BCTHW, torch.tensor([500.0]), torch.randn(1, 512, 32)
        ).sample
    assert latent_BCTHW.shape == velocity_BCTHW.shape == (1, 48, 3, 4, 4)
    assert 0.3 < latent_BCTHW.std() < 2 and 0.3 < velocity_BCTHW.std() < 3


def test_the_tokenizer_agrees_with_its_sentencepiece_model(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(tiny_checkpoint / "tokenizer/spiece.model")
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in (PROMPT, "The camera  pans left.", '현수막에 "축제"라고\n적혀 있다', ""):
        assert tokenizer(text).input_ids == [*model.encode(text), 1]
    assert tokenizer(PROMPT).input_ids.count(2) == 0, (
        "Korean of our own sentences has no unknown pieces"
    )


def test_a_sharded_transformer_loads_like_a_whole_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The real folder's transformer comes as several files and an index."""
    transformer = WanTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer")
    transformer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    again = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in transformer.state_dict().items())


def test_equal_seeds_give_equal_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "same")
    write_tiny_checkpoint(tmp_path / "other", seed=1)
    files = [
        path.relative_to(tiny_checkpoint) for path in tiny_checkpoint.rglob("*") if path.is_file()
    ]
    assert len(files) == 11
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (tiny_checkpoint / name).read_bytes(), (
            name
        )
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    assert (tmp_path / "other" / weights).read_bytes() != (tiny_checkpoint / weights).read_bytes()
