"""CLIP cosine by an image-text encoder: a local folder of SigLIP, SigLIP 2 or CLIP that AutoModel
loads, safetensors only, without remote code.

    cosine of a clip = mean over 8 evenly spaced frames, mean over its caption's sentences, of
                       cos(text, image)

Captions are scored sentence by sentence, because these encoders know 64 tokens and fewer. The
cosines of encoders trained with a sigmoid loss and with a softmax loss are not on one scale.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loader.identity import folder_xxh3
from tools.evaluate.clips import Frames
from tools.evaluate.config import ClipConfig

_SENTENCE_END = re.compile(r"(?<=[.!?。])\s+")
_HANGUL = re.compile(r"[가-힣]")
# real captions must beat other clips' captions by this much of a deviation, or the encoder does
# not read the language
MIN_MARGIN = 0.3


def sentences(caption: str) -> list[str]:
    return [part.strip() for part in _SENTENCE_END.split(caption.strip()) if part.strip()]


class Tower:
    """Texts and frames as unit vectors. Raises ValueError for a folder that can't be used."""

    def __init__(self, config: ClipConfig, device: torch.device):
        import transformers

        folder = Path(config.model)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"clip.model = {folder}: there is no config.json; download an image-text encoder "
                f"there, for example google/siglip2-base-patch16-224; nothing is downloaded here"
            )
        if not list(folder.glob("*.safetensors")):
            raise ValueError(f"clip.model = {folder}: holds no safetensors; other formats run code")
        self._config, self._device = config, device
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._model = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, **options
        ).to(device)
        self._model.eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        self._images = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        kind = "softmax" if "clip" == self._model.config.model_type else "sigmoid"
        if kind != config.kind:
            raise ValueError(
                f'clip.kind = "{config.kind}": {folder} is a {self._model.config.model_type}, '
                f"trained with a {kind} loss"
            )
        self.name = f"{folder.name} ({config.kind}) xxh3 {folder_xxh3(folder)[:8]}"

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [N, max_tokens], padded, lower-cased for SigLIP, which was trained so."""
        if self._config.kind == "sigmoid":
            texts = [text.lower() for text in texts]
        length = self._config.max_tokens
        encoded = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        assert ids.shape == (len(texts), length), f"{tuple(ids.shape)} ids, not {length} each"
        return ids

    def num_truncated(self, texts: Sequence[str]) -> int:
        lengths = (len(self._tokenizer(text).input_ids) for text in texts)
        return sum(length > self._config.max_tokens for length in lengths)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """float32 [N, D]."""
        ids = self.ids(texts).to(self._device)
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if self._config.kind == "softmax":
            inputs["attention_mask"] = (ids != self._tokenizer.pad_token_id).long()
            # CLIP pools at the first end token, which is also its padding
            ends = ids == self._tokenizer.eos_token_id
            first = ends.int().argmax(1)
            positions = torch.arange(ids.shape[1], device=ids.device)
            inputs["attention_mask"] = (positions <= first[:, None]).long()
        return _unit(self._model.get_text_features(**inputs))

    @torch.no_grad()
    def frames(self, frames: Frames) -> np.ndarray[Any, Any]:
        """float32 [num_frames, D] of evenly spaced frames."""
        numbers = np.linspace(0, len(frames) - 1, min(self._config.num_frames, len(frames)))
        pictures = [frames[round(number)] for number in numbers]
        inputs = self._images(images=pictures, return_tensors="pt").to(self._device)
        return _unit(self._model.get_image_features(**inputs))


def _unit(output: Any) -> np.ndarray[Any, Any]:
    # transformers 5 returns an output object, 4 the tensor itself
    tensor = output if isinstance(output, Tensor) else output.pooler_output
    return np.asarray(F.normalize(tensor.float(), dim=-1).cpu().numpy())


def cosine(frames_ND: np.ndarray[Any, Any], sentences_MD: np.ndarray[Any, Any]) -> float:
    """Of one clip with one caption."""
    return float((frames_ND @ sentences_MD.T).mean())


def cosine_table(
    frames: Sequence[np.ndarray[Any, Any]], captions: Sequence[np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """[clips, captions]."""
    return np.array([[cosine(clip, caption) for caption in captions] for clip in frames])


def why_blind(table: np.ndarray[Any, Any], captions: Sequence[str]) -> str:
    """Why an encoder's cosines say nothing about these captions: real clips don't fit their own
    text better than others' ([clips, captions], equal numbers); empty if they do.
    """
    if len(table) < 4:
        return f"{len(table)} real clips: too few to see whether the encoder reads the captions"
    own = np.diag(table)
    others = (table.sum(1) - own) / (len(table) - 1)
    margins = own - others
    error = margins.std(ddof=1) / np.sqrt(len(margins)) + 1e-12
    if margins.mean() > 2 * error and margins.mean() > MIN_MARGIN * table.std():
        return ""
    language = "Korean" if any(_HANGUL.search(text) for text in captions) else "these"
    return (
        f"the encoder does not tell real clips' own captions from others' (margin "
        f"{margins.mean():.4f}, error {error:.4f}): it does not read {language} texts; take a "
        f"multilingual one"
    )


def folder_key(config: ClipConfig) -> str:
    """What the scores of a clip depend on, beside the clip."""
    text = f"{folder_xxh3(Path(config.model))}/{config.kind}/{config.num_frames}"
    return hashlib.sha256(f"{text}/{config.max_tokens}".encode()).hexdigest()[:16]
