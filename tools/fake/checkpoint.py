"""Write a Wan of tiny dimensions: `python -m tools.fake.checkpoint DIR [--kind KIND] [--seed N]`.

The folder has the layout, the class names and the configuration keys of the real one
(Wan-AI/Wan2.2-TI2V-5B-Diffusers, unless another kind is asked for), so whatever loads the one loads
the other through the same code. What is the same as in the real one is what other code relies on:
the latent channels with the published statistics, the VAE's spatial and temporal compression,
patches of (1, 2, 2), flow prediction, A14B's two transformers and their boundary, the scheduler's
shift as diffusers' converter writes it, and the UMT5 tokenizer's conventions. What is smaller is
width and depth.

The weights are random: a picture from this model is coloured noise. They are drawn so that
activations stay near unit variance through every layer, because a model whose attention
contributes nothing would hide a LoRA that is loaded wrongly. Equal seeds give equal bytes (with
equal package versions).
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
import transformers
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tools.fake.randomise import randomise
from tools.fake.vae import WAN21, WAN22, random_vae

TEXT_DIM = 32
# sentinels <extra_id_0..299> at the end of the vocabulary, as google/umt5-xxl has them
NUM_EXTRA_IDS = 300


class Kind(NamedTuple):
    """What tells one Wan from another in its folder. boundary_ratio: of a model of two experts.
    flow_shift: in scheduler/, where A14B's is not the official one.
    """

    vae: dict[str, Any]
    in_channels: int
    out_channels: int
    flow_shift: float
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    pipeline: type[WanPipeline] | type[WanImageToVideoPipeline] = WanPipeline


KINDS = {
    "ti2v-5b": Kind(WAN22, 48, 48, flow_shift=5.0, expand_timesteps=True),
    "t2v-a14b": Kind(WAN21, 16, 16, flow_shift=3.0, boundary_ratio=0.875),
    "i2v-a14b": Kind(
        WAN21, 36, 16, flow_shift=3.0, boundary_ratio=0.9, pipeline=WanImageToVideoPipeline
    ),
    "wan2.1-t2v": Kind(WAN21, 16, 16, flow_shift=3.0),
}


def tiny_transformer(
    generator: torch.Generator, in_channels: int = 48, out_channels: int = 48
) -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=in_channels,
        out_channels=out_channels,
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


def write_tokenizer(folder: Path, more_sentences: Sequence[str] = ()) -> T5TokenizerFast:
    """Train a unigram sentencepiece on sentences.txt, and on `more_sentences`, and save it as
    spiece.model and tokenizer.json.
    """
    sentences = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences += more_sentences
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


def flow_scheduler(shift: float) -> UniPCMultistepScheduler:
    """That of the real folder, with this shift of the noise levels."""
    return UniPCMultistepScheduler(
        num_train_timesteps=1000,
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )


def write_tiny_checkpoint(folder: Path, seed: int = 0, kind: str = "ti2v-5b") -> None:
    """Write model_index.json, transformer/ (of a model of two experts transformer_2/ too), vae/,
    text_encoder/, tokenizer/ and scheduler/ below `folder`. kind: a key of KINDS.
    """
    chosen = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    channels = chosen.in_channels, chosen.out_channels
    has_two = chosen.boundary_ratio is not None
    pipeline = chosen.pipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(len(tokenizer), generator),
        vae=random_vae(chosen.vae, 8, generator),
        scheduler=flow_scheduler(chosen.flow_shift),
        transformer=tiny_transformer(generator, *channels),
        transformer_2=tiny_transformer(generator, *channels) if has_two else None,
        boundary_ratio=chosen.boundary_ratio,
        expand_timesteps=chosen.expand_timesteps,
    )
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a tiny Wan with random weights, diffusers layout."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=sorted(KINDS), default="ti2v-5b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    write_tiny_checkpoint(arguments.folder, arguments.seed, arguments.kind)
    print(f"{arguments.folder}: a tiny {arguments.kind} with random weights, seed {arguments.seed}")


if __name__ == "__main__":
    main()
