"""The figures that have to be reported about the data, each with its definition, target, value
and sample size.

A figure without anything to measure it on says "not measured"; without a target in
[report.targets], "not set".
"""

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec.structs import replace

from shardgen.config import TARGET, TargetsConfig
from shardgen.labels.parse import Label
from shardgen.media.probe import Probe

NOT_MEASURED, NOT_SET = "not measured", "not set"
_SENTENCE_END = re.compile(r"[.!?…。]+(?:[\"'”’)]*)(?:\s|$)")
Row = Any  # of catalog.clips()


class Check(msgspec.Struct, frozen=True):
    """One figure. `value` is a number, or "not measured" where `sample_size` is 0; `reached` is
    None without a value or a target.
    """

    name: str
    definition: str
    target: str
    value: float | str
    unit: str
    sample_size: int
    reached: bool | None = None


def against_targets(checks: Iterable[Check], targets: TargetsConfig) -> list[Check]:
    """The checks with what the configuration wants of each, and whether it is so."""
    held = []
    for check in checks:
        if target := getattr(targets, check.name):
            match = TARGET.fullmatch(target)
            assert match is not None
            wanted = float(match[2])
            reached = (
                None
                if isinstance(check.value, str)
                else (check.value >= wanted if match[1] == ">=" else check.value <= wanted)
            )
            check = replace(check, target=target, reached=reached)
        held.append(check)
    return held


def count_words(text: str) -> int:
    """Runs of characters between white space, which is what a Korean eojeol is; the labels'
    `token` is not used.
    """
    return len(text.split())


def count_sentences(text: str) -> int:
    """Stretches ended by . ! ? … or 。 before white space or the end; what is left without an end
    counts as one.
    """
    ends = list(_SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(rest.strip())


class Figures:
    """Gathers the figures from one row of the catalog after another."""

    def __init__(self) -> None:
        self.fetched = self.decodable = self.right_type = 0
        self.sized = self.same_size = self.timed = self.same_length = self.rated = (
            self.same_rate
        ) = 0
        self.lengths_s: list[float] = []
        self.num_prompts = self.num_words = self.num_sentences = 0

    def add_media(self, row: Row, probe: Probe | None) -> None:
        """A label file whose media were fetched."""
        self.fetched += 1
        if probe is None:
            return
        self.decodable += 1
        self.right_type += probe.media_type == row["media_type"]
        if row["declared_width_px"]:
            self.sized += 1
            self.same_size += (row["declared_width_px"], row["declared_height_px"]) == (
                probe.width_px,
                probe.height_px,
            )
        if probe.media_type == "video" and row["declared_duration_s"] is not None:
            self.timed += 1
            self.same_length += abs(row["declared_duration_s"] - probe.duration_s) <= 0.1
        if probe.media_type == "video" and row["declared_fps"] is not None:
            self.rated += 1
            self.same_rate += abs(row["declared_fps"] - probe.fps) <= 0.01

    def add_accepted(self, probe: Probe, prompts: list[str]) -> None:
        """A clip that gave samples, with its different prompts."""
        if probe.media_type == "video":
            self.lengths_s.append(probe.duration_s)
        self.num_prompts += len(prompts)
        self.num_words += sum(map(count_words, prompts))
        self.num_sentences += sum(map(count_sentences, prompts))

    def checks(self) -> list[Check]:
        """All figures, in the order of the report."""
        videos = len(self.lengths_s)
        total_s = sum(self.lengths_s)
        return [
            _share(
                "file_validity",
                "media that decode from the first frame to the last, of all that were fetched",
                self.decodable,
                self.fetched,
            ),
            _share(
                "format_agreement",
                "media of the kind (video, image) that their label says, of all that decode",
                self.right_type,
                self.decodable,
            ),
            _share(
                "size_agreement",
                "media stored in the width and height that their label declares",
                self.same_size,
                self.sized,
            ),
            _share(
                "length_agreement",
                "videos whose decoded length is within 0.1 s of the declared one",
                self.same_length,
                self.timed,
            ),
            _share(
                "rate_agreement",
                "videos whose decoded frame rate is within 0.01 of the declared one",
                self.same_rate,
                self.rated,
            ),
            _mean("mean_length", "decoded length of the accepted videos", total_s, videos, "s"),
            _share(
                "over_25_s",
                "accepted videos longer than 25 s",
                sum(each > 25 for each in self.lengths_s),
                videos,
            ),
            Check(
                "total_length",
                "decoded length of all accepted videos together",
                NOT_SET,
                round(total_s / 3600, 4) if videos else NOT_MEASURED,
                "h",
                videos,
            ),
            _mean(
                "words_per_description",
                "words per prompt; a word is what stands between white space",
                self.num_words,
                self.num_prompts,
                "words",
            ),
            _mean(
                "sentences_per_description",
                "sentences per prompt; one ends with . ! ? … or 。 before white space "
                "or the end, and a rest without an end counts as one",
                self.num_sentences,
                self.num_prompts,
                "sentences",
            ),
        ]


def _share(name: str, definition: str, count: int, total: int) -> Check:
    """Per cent to four places: one file of a million must not round away, or a target of 100
    would seem reached.
    """
    return Check(
        name,
        definition,
        NOT_SET,
        round(100 * count / total, 4) if total else NOT_MEASURED,
        "%",
        total,
    )


def _mean(name: str, definition: str, total: float, count: int, unit: str) -> Check:
    return Check(
        name, definition, NOT_SET, round(total / count, 3) if count else NOT_MEASURED, unit, count
    )


def metadata_line(row: Row, label: Label, probe: Probe, prompts: list[str]) -> dict[str, Any]:
    """A clip as the users' metadata.jsonl has it."""
    return {
        "clip_id": row["clip_id"],
        "video_url": label.url,
        "thumbnail_urls": label.thumbnail_urls,
        "prompt": " ".join(prompts),
        "stt_script": label.stt_script,
        "duration": probe.duration_s,
        "fps": probe.fps,
    }
