"""UMT5: prompts in, one float16 row per real token out.

The prompts arrive cleaned (shardgen.rules.prompt). The tokenizer appends `</s>` and cuts at 512
tokens, which is recorded. Rows of padding are not stored: the loader pads with zeros, as diffusers'
pipelines do after the encoder.

In float16 the encoder can overflow without a sign: transformers runs the second matrix of each
feed-forward layer in float32, but clamps hidden states that are infinite. So every layer's output
is watched, and a prompt that saturates anywhere is handed back to be encoded in float32.

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
    was longer than that. `in_float32`: half precision would have saturated.
    """

    rows: np.ndarray[Any, Any]
    truncated: bool
    in_float32: bool = False


class Encoded(NamedTuple):
    """What `TextEncoder.encode` made of some prompts, and those on which float16 saturated, in
    order.
    """

    texts: dict[str, EncodedText]
    saturated: list[str]


class SaturationWatch:
    """Remembers, for each prompt of a batch, whether an activation left float16's range.

    Looks at what each block's layers put out, before transformers clamps it. Where there is an
    infinity it clamps the whole batch to 1,000 below the largest number, so whatever reaches that
    counts; in float32 (behind the first feed-forward layer) only what isn't finite does. An
    infinity inside a layer comes out as one, or as a NaN.
    """

    LIMIT = torch.finfo(torch.float16).max - 1000

    def __init__(self, model: UMT5EncoderModel) -> None:
        self._is_saturated_B: torch.Tensor | None = None
        for block in model.encoder.block:
            for layer in block.layer:
                layer.register_forward_hook(self._look)

    def _look(self, _module: object, _inputs: object, output: Any) -> None:
        hidden_BSD = output[0] if isinstance(output, tuple) else output
        limit = self.LIMIT if hidden_BSD.dtype == torch.float16 else torch.inf
        # false for a NaN too
        is_sound_B = (hidden_BSD.abs() < limit).flatten(1).all(1)
        before_B = self._is_saturated_B
        self._is_saturated_B = ~is_sound_B if before_B is None else before_B | ~is_sound_B

    def take(self) -> list[bool]:
        """For each prompt of the last batch; forgets it."""
        is_saturated_B, self._is_saturated_B = self._is_saturated_B, None
        assert is_saturated_B is not None
        flags: list[bool] = is_saturated_B.tolist()
        return flags


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
        self.device, self._model_dir = torch.device(device), model_dir
        self._exact: TextEncoder | None = None
        self.tokenizer = AutoTokenizer.from_pretrained(
            model_dir / "tokenizer", local_files_only=True
        )
        # of a float16 model transformers keeps the second feed-forward matrix in float32: it would
        # overflow there
        self.model = UMT5EncoderModel.from_pretrained(
            model_dir / "text_encoder", dtype=dtype, local_files_only=True
        )
        self.model.eval().requires_grad_(False)
        self._watch = SaturationWatch(self.model) if dtype == torch.float16 else None

    def in_float32(self) -> "TextEncoder":
        """The same model for prompts on which this one saturates: read from disk on demand, because
        float16 weights are rounded, and kept from then on. It waits on the CPU too.
        """
        if self._exact is None:
            self._exact = TextEncoder(self._model_dir, self.device, torch.float32)
        return self._exact

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], batch_size: int) -> Encoded:
        """Encode each different prompt once. Raises TextError where a result leaves the range of
        float16, which shards hold, though no layer of the model has saturated.
        """
        # Uncut, to know what truncation takes and to put prompts of equal length together.
        whole = {prompt: self.tokenizer(prompt).input_ids for prompt in dict.fromkeys(prompts)}
        order = sorted(whole, key=lambda prompt: (len(whole[prompt]), prompt))
        encoded = Encoded({}, [])
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
            is_saturated_B = self._watch.take() if self._watch else [False] * len(batch)
            # Rows of real tokens only: the rest is padding.
            for prompt, rows_SD, mask_S, is_saturated in zip(
                batch, rows_BSD, tokens.attention_mask.cpu(), is_saturated_B, strict=True
            ):
                if is_saturated:
                    encoded.saturated.append(prompt)
                    continue
                num_tokens = int(mask_S.sum())
                if not np.isfinite(rows_SD[:num_tokens]).all():
                    raise TextError(
                        f"the text of the prompt {prompt[:80]!r} is not finite in float16, in "
                        f"which shards hold it, whatever encode.dtype is: leave the prompt's label "
                        f"out, or download the model again if this is so of every prompt"
                    )
                encoded.texts[prompt] = EncodedText(
                    rows_SD[:num_tokens].copy(), len(whole[prompt]) > num_tokens
                )
        return encoded
