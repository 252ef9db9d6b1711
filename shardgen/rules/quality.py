"""Which clips are good enough: pure rules from values to a Verdict, none of which touches a file
or a database.

A rule has a stable reason code, and its verdict says the value and the limit. Rules run twice: on
what the label declares, before anything is fetched, and on what the probe found, when both values
go into the record: the label is often wrong (every one of 4,000 probed files was 720x480 although
its label said 1920x1080).

The reason codes, in the order of the rules; the first that applies is the clip's one reason:
  label  media_type_unwanted caption_missing caption_short caption_long caption_repeated_word
         caption_repeated_char caption_special_chars duration_short duration_long
         resolution_unknown timecode_invalid timecode_reversed
  media  media_type_differs duration_short duration_long picture_small upscale_large
         timecode_before_start timecode_past_end shot_short
Others come from reading (label_*), reviewers (excluded_by_review), fetching (media_missing, url_*,
http_*), probing (media_*) and from counting (clip_id_repeated, duplicate_media).
"""

import re
from itertools import groupby
from typing import NamedTuple

from shardgen.labels.parse import Label
from shardgen.rules.config import FiltersConfig

_RUNS = re.compile(r"(\S)\1+")
_PLAIN = re.compile(r"[\w\s.,!?'\"()·…“”‘’~%:-]")


class Verdict(NamedTuple):
    """Why a clip is rejected. `declared` and `probed` are the label's value and the media's,
    where there are both.
    """

    reason: str
    detail: str
    declared: str = ""
    probed: str = ""


class Scores(NamedTuple):
    """What the caption rules look at. Runs count one word or character in a row; special_share is
    in 0..1.
    """

    caption_chars: int
    word_run: int
    char_run: int
    special_share: float


def score_caption(caption: str) -> Scores:
    """Measure a caption whose white space is single spaces."""
    words = caption.split(" ")
    word_run = (
        max(len(list(run)) for _, run in groupby(words)) if len(set(words)) < len(words) else 1
    )
    char_run = max((match.end() - match.start() for match in _RUNS.finditer(caption)), default=1)
    special_share = len(_PLAIN.sub("", caption)) / len(caption) if caption else 0.0
    return Scores(
        len(caption),
        word_run if caption else 0,
        char_run if caption else 0,
        round(special_share, 4),
    )


def judge_label(
    label: Label, media_type: str, scores: Scores, filters: FiltersConfig
) -> Verdict | None:
    """The first rule that a label breaks by what it declares; None if it breaks none."""
    if media_type not in filters.media_types:
        return Verdict(
            "media_type_unwanted",
            f"{media_type[:40]!r}; filters.media_types = {list(filters.media_types)}",
        )
    if verdict := _judge_caption(scores, filters):
        return verdict
    # A length that the label doesn't declare, or that can't be read, is the probe's to judge.
    if (
        media_type == "video"
        and label.duration_s is not None
        and (verdict := _judge_duration(label.duration_s, filters))
    ):
        return verdict
    if filters.require_resolution and label.width_px is None:
        return Verdict(
            "resolution_unknown",
            'none of the label\'s four places holds a resolution "WIDTH, HEIGHT"',
        )
    return None


def _judge_caption(scores: Scores, filters: FiltersConfig) -> Verdict | None:
    if scores.caption_chars == 0:
        return Verdict("caption_missing", "no sentence of the levels that make the prompt")
    if scores.caption_chars < filters.min_caption_chars:
        return Verdict(
            "caption_short",
            f"{scores.caption_chars} characters; min_caption_chars = {filters.min_caption_chars}",
        )
    if filters.max_caption_chars and scores.caption_chars > filters.max_caption_chars:
        return Verdict(
            "caption_long",
            f"{scores.caption_chars} characters; max_caption_chars = {filters.max_caption_chars}",
        )
    if filters.max_word_run and scores.word_run > filters.max_word_run:
        return Verdict(
            "caption_repeated_word",
            f"a word {scores.word_run} times in a row; max_word_run = {filters.max_word_run}",
        )
    if filters.max_char_run and scores.char_run > filters.max_char_run:
        return Verdict(
            "caption_repeated_char",
            f"a character {scores.char_run} times in a row; max_char_run = {filters.max_char_run}",
        )
    if filters.max_special_share and scores.special_share > filters.max_special_share:
        return Verdict(
            "caption_special_chars",
            f"{scores.special_share:.0%} special characters; max_special_share = "
            f"{filters.max_special_share}",
        )
    return None


def _judge_duration(duration_s: float, filters: FiltersConfig) -> Verdict | None:
    if duration_s < filters.min_duration_s:
        return Verdict(
            "duration_short", f"{duration_s:.2f} s; min_duration_s = {filters.min_duration_s}"
        )
    if filters.max_duration_s and duration_s > filters.max_duration_s:
        return Verdict(
            "duration_long", f"{duration_s:.2f} s; max_duration_s = {filters.max_duration_s}"
        )
    return None


def judge_media(
    media_type: str,
    declared_duration_s: float | None,
    declared_size: str,
    probed_type: str,
    probed_duration_s: float,
    width_px: int,
    height_px: int,
    upscale: float,
    filters: FiltersConfig,
) -> Verdict | None:
    """The first rule that the probed media break. Sizes are on the screen, after SAR and
    rotation; `upscale` is the resize factor to the bucket.
    """
    if probed_type != media_type:
        return Verdict(
            "media_type_differs",
            f"the label says {media_type}, the file is a {probed_type}",
            media_type,
            probed_type,
        )
    if media_type == "video" and (verdict := _judge_duration(probed_duration_s, filters)):
        declared = f"{declared_duration_s:.2f} s" if declared_duration_s is not None else "unknown"
        return verdict._replace(declared=declared, probed=f"{probed_duration_s:.2f} s")
    size = f"{width_px}x{height_px}"
    if min(width_px, height_px) < filters.min_short_side_px:
        return Verdict(
            "picture_small",
            f"{size}; min_short_side_px = {filters.min_short_side_px}",
            declared_size,
            size,
        )
    if filters.max_upscale and upscale > filters.max_upscale:
        return Verdict(
            "upscale_large",
            f"{size} must be enlarged {upscale:.2f} times; max_upscale = {filters.max_upscale}",
            declared_size,
            size,
        )
    return None
