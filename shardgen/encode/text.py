"""UMT5: prompts in, one float16 row per real token out.

The prompts arrive cleaned (shardgen.rules.prompt). The tokenizer appends `</s>` and cuts at 512
tokens, which is recorded. Rows of padding are not stored: the loader pads with zeros, as diffusers'
pipelines do after the encoder.

Which prompts share a batch decides the last bits of the result (measured, fp16), so batches are a
function of the list of prompts alone: equal ones once, sorted by length so that little is padded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from loader.sample import MAX_TEXT_TOKENS


class TextError(ValueError):
    """The text encoder can't be used or overflowed; the message names the folder or the prompt
    and how to fix it.
    """


class EncodedText(NamedTuple):
    """`rows`: float16 [num_tokens, text_dim], finite, `</s>` included. `truncated`: the prompt
    was longer than that.
    """

    rows: np.ndarray[Any, Any]
    truncated: bool


class TextEncoder:
    """A tokenizer and an encoder from a diffusers folder. The model waits on the CPU: the owner
    moves `model`.
    """

    def __init__(self, model_dir: Path, device: torch.device | str, dtype: torch.dtype) -> None:
        for name in ("tokenizer", "text_encoder"):
            if not (model_dir / name).is_dir():
                raise TextError(
                    f"{model_dir / name}: no such folder; the model must be in diffusers layout, "
                    f"as Wan-AI/Wan2.2-TI2V-5B-Diffusers is"
                )
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(
            model_dir / "tokenizer", local_files_only=True
        )
        # transformers keeps the second feed-forward matrix in float32 whatever is asked: float16
        # would overflow there
        self.model = UMT5EncoderModel.from_pretrained(
            model_dir / "text_encoder", dtype=dtype, local_files_only=True
        )
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], batch_size: int) -> dict[str, EncodedText]:
        """Encode each different prompt once: {prompt: EncodedText}. Raises TextError where the
        result is not finite.
        """
        # Uncut, to know what truncation takes and to put prompts of equal length together.
        whole = {prompt: self.tokenizer(prompt).input_ids for prompt in dict.fromkeys(prompts)}
        order = sorted(whole, key=lambda prompt: (len(whole[prompt]), prompt))
        encoded: dict[str, EncodedText] = {}
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            tokens = self.tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=MAX_TEXT_TOKENS,
                add_special_tokens=True,
                return_tensors="pt",
            ).to(self.device)
            hidden_BSD = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
            rows_BSD = hidden_BSD.to(torch.float16).cpu().numpy()
            # Rows of real tokens only: the rest is padding.
            for prompt, rows_SD, mask_S in zip(
                batch, rows_BSD, tokens.attention_mask.cpu(), strict=True
            ):
                num_tokens = int(mask_S.sum())
                if not np.isfinite(rows_SD[:num_tokens]).all():
                    raise TextError(
                        f"the text encoder overflowed on the prompt {prompt[:80]!r}; set "
                        f'encode.dtype = "float32" or "bfloat16"'
                    )
                encoded[prompt] = EncodedText(
                    rows_SD[:num_tokens].copy(), len(whole[prompt]) > num_tokens
                )
        return encoded
