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

_SPACE = re.compile(r"\s+")
IMAGE_WORD = "이미지"


def prompt_clean(text: str) -> str:
    """diffusers' prompt_clean: ftfy, HTML entities twice, white space to single spaces."""
    return squeeze(html.unescape(html.unescape(ftfy.fix_text(text))))


def squeeze(text: str) -> str:
    """White space to single spaces, none at the ends."""
    return _SPACE.sub(" ", text).strip()


def join_sentences(
    scenes: Iterable[str],
    objects: Iterable[str],
    semantic: Iterable[str],
    stt: str,
    application: Iterable[str],
    media_type: str,
    *,
    use_scene: bool,
    use_object: bool,
    use_semantic: bool,
    use_stt: bool,
    use_application: bool,
) -> str:
    """The sentences that the recipe asks for, in its order, each once, on one line; not yet
    cleaned.

    A scene description that speaks of an image ("이미지") on a video is dropped: it was generated
    from something else.
    """
    chosen: list[str] = []
    if use_scene:
        chosen += [text for text in scenes if media_type != "video" or IMAGE_WORD not in text]
    if use_object:
        chosen += objects
    if use_semantic:
        chosen += semantic
    if use_stt:
        chosen.append(stt)
    if use_application:
        chosen += application
    return " ".join(dict.fromkeys(filter(None, map(squeeze, chosen))))
