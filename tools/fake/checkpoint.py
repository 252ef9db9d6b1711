"""Write a Wan2.2-TI2V-5B of tiny dimensions: `python -m tools.fake.checkpoint DIR [--seed N]`.

The folder has the layout, the class names and the configuration keys of
Wan-AI/Wan2.2-TI2V-5B-Diffusers, so whatever loads the one loads the other through the same code.
What is the same as in the real one is what other code relies on: 48 latent channels with the
published statistics, the VAE's 16x spatial and 4x temporal compression, patches of (1, 2, 2),
flow prediction with shift 5, and the UMT5 tokenizer's conventions. What is smaller is width and
depth.

The weights are random: a picture from this model is coloured noise. They are drawn so that
activations stay near unit variance through every layer, because a model whose attention
contributes nothing would hide a LoRA that is loaded wrongly. Equal seeds give equal bytes (with
equal package versions).
"""

import argparse
import io
from pathlib import Path

import sentencepiece
import torch
import transformers
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 32
# sentinels <extra_id_0..299> at the end of the vocabulary, as google/umt5-xxl has them
NUM_EXTRA_IDS = 300

# Mean and standard deviation per latent channel: the published constants of the Wan2.2 VAE
# (Wan2.2, vae2_2.py; the same numbers stand in vae/config.json of the diffusers folder).
LATENTS_MEAN = [
    -0.2289,
    -0.0052,
    -0.1323,
    -0.2339,
    -0.2799,
    0.0174,
    0.1838,
    0.1557,
    -0.1382,
    0.0542,
    0.2813,
    0.0891,
    0.1570,
    -0.0098,
    0.0375,
    -0.1825,
    -0.2246,
    -0.1207,
    -0.0698,
    0.5109,
    0.2665,
    -0.2108,
    -0.2158,
    0.2502,
    -0.2055,
    -0.0322,
    0.1109,
    0.1567,
    -0.0729,
    0.0899,
    -0.2799,
    -0.1230,
    -0.0313,
    -0.1649,
    0.0117,
    0.0723,
    -0.2839,
    -0.2083,
    -0.0520,
    0.3748,
    0.0152,
    0.1957,
    0.1433,
    -0.2944,
    0.3573,
    -0.0548,
    -0.1681,
    -0.0667,
]
LATENTS_STD = [
    0.4765,
    1.0364,
    0.4514,
    1.1677,
    0.5313,
    0.4990,
    0.4818,
    0.5013,
    0.8158,
    1.0344,
    0.5894,
    1.0901,
    0.6885,
    0.6165,
    0.8454,
    0.4978,
    0.5759,
    0.3523,
    0.7135,
    0.6804,
    0.5833,
    1.4146,
    0.8986,
    0.5659,
    0.7069,
    0.5338,
    0.4889,
    0.4917,
    0.4069,
    0.4999,
    0.6866,
    0.4093,
    0.5709,
    0.6065,
    0.6415,
    0.4944,
    0.5726,
    1.2042,
    0.5458,
    1.6887,
    0.3971,
    1.0600,
    0.3943,
    0.5537,
    0.5444,
    0.4089,
    0.7468,
    0.7744,
]


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Overwrite every parameter: matrices N(0, 1/fan_in), biases near 0, scales near 1. Embedding
    rows are N(0, 1).
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            value = noise
        elif name.endswith("scale_shift_table"):
            value = noise / parameter.shape[-1] ** 0.5
        elif name.endswith("bias"):
            value = 0.02 * noise
        elif parameter.squeeze().ndim <= 1:  # a norm's scale
            value = 1 + 0.1 * noise
        else:
            value = noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def tiny_transformer(generator: torch.Generator) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=48,
        out_channels=48,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=64,
        freq_dim=64,
        text_dim=TEXT_DIM,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    )
    randomise(transformer, generator)
    return transformer


def tiny_vae(generator: torch.Generator) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )
    randomise(vae, generator)
    return vae


def tiny_text_encoder(vocab_size: int, generator: torch.Generator) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    encoder = UMT5EncoderModel(config)
    randomise(encoder, generator)
    return encoder.eval()


def write_tokenizer(folder: Path) -> T5TokenizerFast:
    """Train a unigram sentencepiece on sentences.txt and save it as spiece.model and
    tokenizer.json.
    """
    sentences = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=NUM_EXTRA_IDS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write model_index.json, transformer/, vae/, text_encoder/, tokenizer/ and scheduler/ below
    `folder`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(len(tokenizer), generator),
        vae=tiny_vae(generator),
        scheduler=UniPCMultistepScheduler(
            num_train_timesteps=1000,
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0,
        ),
        transformer=tiny_transformer(generator),
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=True,
    )
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a tiny Wan2.2-TI2V-5B with random weights, diffusers layout."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    write_tiny_checkpoint(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: a tiny Wan2.2-TI2V-5B with random weights, seed {arguments.seed}")


if __name__ == "__main__":
    main()
