"""What is counted and measured of the data, and the checks that have to be reported, each with
its definition, target, value and sample size.

A check without anything to measure it on says "not measured"; without a target in
[report.targets], "not set".
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from shardgen.catalog.rows import Clip
from shardgen.media.probe import Probe
from shardgen.report.config import TARGET, TargetsConfig

NOT_MEASURED, NOT_SET = "not measured", "not set"
_SENTENCE_END = re.compile(r"[.!?…。]+(?:[\"'”’)]*)(?:\s|$)")


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
    compared = []
    for check in checks:
        if target := getattr(targets, check.name):
            reached = None if isinstance(check.value, str) else _reaches(check.value, target)
            check = replace(check, target=target, reached=reached)
        compared.append(check)
    return compared


def _reaches(value: float, target: str) -> bool:
    match = TARGET.fullmatch(target)
    assert match is not None, f"the configuration let {target!r} pass"
    wanted = float(match[2])
    return value >= wanted if match[1] == ">=" else value <= wanted


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
    """Gathers all figures from one clip of the catalog after another."""

    def __init__(self) -> None:
        # For the report's tables.
        self.num_by_sizes: Counter[tuple[str, str]] = Counter()  # declared, probed
        self.num_by_whole_seconds: Counter[int] = Counter()  # of accepted videos
        self.num_by_flag: Counter[str] = Counter()
        self.num_by_split: Counter[tuple[str, str]] = Counter()  # category, split
        self.programmes: dict[str, set[str]] = {"train": set(), "val": set()}
        # For the checks: how many were looked at, and how many are as they should be.
        self.fetched = self.decodable = self.right_type = 0
        self.with_size = self.same_size = 0
        self.with_length = self.same_length = 0
        self.with_rate = self.same_rate = 0
        self.lengths_s: list[float] = []
        self.num_prompts = self.num_words = self.num_sentences = 0

    def add(self, clip: Clip) -> None:
        """Any label file."""
        self.fetched += bool(clip.media_xxh3)
        probe = clip.probe
        if probe is None:
            return
        self.num_by_sizes[clip.declared_size, f"{probe.width_px}x{probe.height_px}"] += 1
        self.decodable += 1
        self.right_type += probe.media_type == clip.media_type
        if clip.declared_width_px:
            declared = clip.declared_width_px, clip.declared_height_px
            self.with_size += 1
            self.same_size += declared == (probe.width_px, probe.height_px)
        if probe.media_type == "video" and clip.declared_duration_s is not None:
            self.with_length += 1
            self.same_length += abs(clip.declared_duration_s - probe.duration_s) <= 0.1
        if probe.media_type == "video" and clip.declared_fps is not None:
            self.with_rate += 1
            self.same_rate += abs(clip.declared_fps - probe.fps) <= 0.01

    def add_accepted(self, clip: Clip, probe: Probe, prompts: Sequence[str]) -> None:
        """A clip that gave samples, besides `add`, with its different prompts."""
        if probe.media_type == "video":
            self.lengths_s.append(probe.duration_s)
            self.num_by_whole_seconds[int(probe.duration_s)] += 1
        self.num_by_flag.update(clip.flags.split())
        self.num_by_split[clip.category, clip.split] += 1
        self.programmes[clip.split].add(clip.programme)
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
                self.with_size,
            ),
            _share(
                "length_agreement",
                "videos whose decoded length is within 0.1 s of the declared one",
                self.same_length,
                self.with_length,
            ),
            _share(
                "rate_agreement",
                "videos whose decoded frame rate is within 0.01 of the declared one",
                self.same_rate,
                self.with_rate,
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
