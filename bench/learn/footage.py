"""What the learned model is trained on, in one small file that travels to the GPU.

`prepare` runs on a CPU and writes MODEL/tokenizer, text_encoder, scheduler and model_index.json,
which are made and not learned, and footage.npz: the film's frames and the captions' embeddings.
`load` needs neither a video decoder nor transformers. The photographs are in the repository.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loader.files import write_atomic
from loader.sample import MAX_TEXT_TOKENS
from tools.fake import learned_clips
from tools.fake.learned_clips import HELD_OUT, captions, film_frames

FILE = "footage.npz"
SHIFT = 3.0  # of the noise levels, in training and in the scheduler


class Footage(NamedTuple):
    """N windows and K captions, all on the device.

    pixels_NCFHW: uint8. caption_N, subject_N: numbers of `captions` and `subjects`. excluded_N:
    from all training. held_out_N: of the subject that only a LoRA is taught. text_KSD: float32,
    S = 512, zeros after each caption's last row; empty_SD: of "".
    """

    subjects: list[str]
    captions: list[str]
    caption_subjects: list[str]
    pixels_NCFHW: Tensor
    caption_N: Tensor
    subject_N: Tensor
    excluded_N: Tensor
    held_out_N: Tensor
    text_KSD: Tensor
    text_rows: list[int]
    empty_SD: Tensor
    empty_rows: int


def prepare(output: Path, model: Path, seed: int = 0) -> None:
    """Write output/footage.npz and the parts of `model` that are not learned."""
    import transformers
    from diffusers import WanPipeline

    from tools.fake.checkpoint import (
        flow_scheduler,
        tiny_text_encoder,
        tiny_transformer,
        write_tokenizer,
    )
    from tools.fake.vae import WAN22, random_vae

    transformers.logging.disable_progress_bar()
    texts = list(captions())
    tokenizer = write_tokenizer(model / "tokenizer", texts)
    encoder = tiny_text_encoder(len(tokenizer), torch.Generator().manual_seed(seed))
    encoder.save_pretrained(model / "text_encoder")
    flow_scheduler(SHIFT).save_pretrained(model / "scheduler")
    # model_index.json names the classes of all parts, so there must be some of each
    index = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=random_vae(WAN22, 8, torch.Generator()),
        scheduler=flow_scheduler(SHIFT),
        transformer=tiny_transformer(torch.Generator()),
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=True,
    )
    index.save_config(model)

    arrays: dict[str, np.ndarray] = {"film": film_frames()}
    for number, text in enumerate(["", *texts]):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            rows_SD = encoder(ids).last_hidden_state[0]
        arrays[f"text{number:03d}"] = rows_SD.half().numpy()
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
    write_atomic(output / FILE, data.getvalue())
    print(f"{output / FILE}: {len(texts)} captions, {len(data.getvalue()) / 2**20:.1f} MiB")


def load(folder: Path, device: torch.device, every: int = 1) -> Footage:
    """`every`: of how many windows one is taken, to try the logic. Raises ValueError where
    `prepare` was not run, or for other captions.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{path} is missing; run `python -m bench.learn prepare` first")
    texts = captions()
    with np.load(path) as arrays:
        rows = [torch.from_numpy(arrays[name]) for name in sorted(arrays) if name != "film"]
        windows = learned_clips.all_windows(arrays["film"])[::every]
    if len(rows) != len(texts) + 1:
        raise ValueError(f"{path} has {len(rows) - 1} captions, not {len(texts)}; prepare it again")
    padded_KSD = torch.stack(
        [
            torch.nn.functional.pad(x_SD.float(), (0, 0, 0, MAX_TEXT_TOKENS - len(x_SD)))
            for x_SD in rows
        ]
    ).to(device)
    subjects, numbers = list(learned_clips.SENTENCES), list(texts)
    pixels = np.stack([window.frames for window in windows])
    return Footage(
        subjects=subjects,
        captions=numbers,
        caption_subjects=list(texts.values()),
        pixels_NCFHW=torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).contiguous().to(device),
        caption_N=torch.tensor([numbers.index(w.caption) for w in windows], device=device),
        subject_N=torch.tensor([subjects.index(w.subject) for w in windows], device=device),
        excluded_N=torch.tensor([w.excluded for w in windows], device=device),
        held_out_N=torch.tensor([w.subject == HELD_OUT for w in windows], device=device),
        text_KSD=padded_KSD[1:],
        text_rows=[len(x_SD) for x_SD in rows[1:]],
        empty_SD=padded_KSD[0],
        empty_rows=len(rows[0]),
    )


def pixels_of(pixels_NCFHW: Tensor, numbers: Tensor) -> Tensor:
    """Some windows in [-1, 1], float32."""
    return pixels_NCFHW[numbers].float() / 127.5 - 1
