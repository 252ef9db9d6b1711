"""The prompt of one shot: its scene description, then its object sentences, then the semantic ones.

What belongs to one shot alone goes to its windows alone; semantic sentences have no timecodes and
go to all. Speech and "could be used as" sentences describe no picture and are off by default. The
result is cleaned as diffusers' pipelines clean a prompt at inference (its `prompt_clean`; the
test shows that ours is the same function), because the model should see in training what it will
see in use.
"""

import html
import re
from collections.abc import Iterable

import ftfy

from shardgen.labels.parse import Label
from shardgen.rules.config import PromptConfig

_SPACE = re.compile(r"\s+")
IMAGE_WORD = "이미지"


def prompt_clean(text: str) -> str:
    """diffusers' prompt_clean: ftfy, HTML entities twice, white space to single spaces."""
    return squeeze(html.unescape(html.unescape(ftfy.fix_text(text))))


def squeeze(text: str) -> str:
    """White space to single spaces, none at the ends."""
    return _SPACE.sub(" ", text).strip()


def prompt_of(
    label: Label,
    media_type: str,
    scenes: Iterable[str],
    objects: Iterable[str],
    *,
    parts: PromptConfig,
) -> str:
    """The sentences that `parts` asks for, in the recipe's order, each once, on one line; not yet
    cleaned. `scenes` and `objects` are those of one shot, or of all.

    A scene description that speaks of an image ("이미지") on a video is dropped: it was generated
    from something else.
    """
    chosen: list[str] = []
    if parts.scene:
        chosen += [text for text in scenes if media_type != "video" or IMAGE_WORD not in text]
    if parts.object:
        chosen += objects
    if parts.semantic:
        chosen += label.semantic
    if parts.stt:
        chosen.append(label.stt_script)
    if parts.application:
        chosen += label.application
    return " ".join(dict.fromkeys(filter(None, map(squeeze, chosen))))


def clip_prompt(label: Label, media_type: str, parts: PromptConfig) -> str:
    """The caption that the label rules judge: the prompt of all shots together."""
    scenes = [scene.text for scene in label.scenes]
    objects = [each.text for each in label.objects]
    return prompt_of(label, media_type, scenes, objects, parts=parts)
