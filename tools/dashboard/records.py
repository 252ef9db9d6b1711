"""The files that the dashboard reads, as types: what each may hold, and nothing that is not there.
Those of builds, steps and evaluations have theirs in shardgen.report.progress, train.records and
tools.evaluate.result.

Every field has a default, because a file of an older writer lacks some: what is absent reads "not
measured" on the page. Unknown fields are ignored. A file that can't be decoded is reported by name
on the page, never guessed at.
"""

from typing import Any

import msgspec

from tools.evaluate.result import Value


class Check(msgspec.Struct, frozen=True):
    """A figure of quality_report.json."""

    name: str
    definition: str = ""
    target: str = ""
    value: Value = None
    unit: str = ""
    sample_size: int = 0
    reached: bool | None = None


class Programmes(msgspec.Struct, frozen=True):
    train: int | None = None
    val: int | None = None
    on_both_sides: list[str] = []


class SizePair(msgspec.Struct, frozen=True):
    declared: str
    probed: str
    clips: int


class QualityReport(msgspec.Struct, frozen=True):
    """quality_report.json of a build."""

    label_files: int | None = None
    statuses: dict[str, int] = {}
    categories: dict[str, dict[str, int]] = {}
    reasons: dict[str, dict[str, int]] = {}
    samples: dict[str, dict[str, int]] = {}
    programmes: Programmes = Programmes()
    flags: dict[str, int] = {}
    declared_against_probed_size: list[SizePair] = []
    accepted_videos_by_whole_seconds: dict[str, int] = {}
    checks: list[Check] = []


class RunStatus(msgspec.Struct, frozen=True):
    """status.json of a run."""

    state: str = ""
    reason: str = ""
    step: int | None = None
    num_steps: int | None = None
    best_step: int | None = None
    time: float | str | None = None


class ValidationLine(msgspec.Struct, frozen=True):
    """A line of validation.jsonl. Losses are relative to the base's: 1.0 is no change."""

    step: int
    relative: float | None = msgspec.field(default=None, name="relative_loss")
    # in the order of the noise levels, the lowest first
    by_level: list[float] = []
    per_task: dict[str, float | None] = msgspec.field(default_factory=dict, name="by_task")
    per_category: dict[str, float | None] = msgspec.field(default_factory=dict, name="by_category")
    # at the lower noise levels
    psnr_by_level_db: list[float] = msgspec.field(default_factory=list, name="psnr_db")
    difference: float | None = None
    difference_se: float | None = msgspec.field(default=None, name="standard_error")
    train_relative: float | None = msgspec.field(default=None, name="train_relative_loss")
    num_windows: int | None = None

    @property
    def per_sigma(self) -> dict[str, float | None]:
        return {str(number): value for number, value in enumerate(self.by_level, start=1)}

    @property
    def psnr_db(self) -> float | None:
        """The mean over the levels that it is measured at."""
        values = self.psnr_by_level_db
        return sum(values) / len(values) if values else None


class SampleClip(msgspec.Struct, frozen=True):
    """One clip of a sampling event. `file` is relative to its samples.json."""

    file: str
    prompt: str = ""
    key: str = ""
    task: str = ""
    seed: int | None = None
    # mean difference from the base, of 255
    difference_levels: float | None = msgspec.field(default=None, name="mean_difference_levels")


class SampleSet(msgspec.Struct, frozen=True):
    """samples.json of one event."""

    step: int | None = None
    shape: str = ""
    num_steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    tiled: bool | None = None
    # where one expert of two made the clips: which part of a clip it makes
    shows: str = ""
    lora_xxh3: str = ""
    norms: dict[str, float] = msgspec.field(default_factory=dict, name="update_norms")
    clips: list[SampleClip] = []


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-4, ...} of nested tables."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, dict):
            found |= flat(each, f"{prefix}{name}.")
        else:
            found[prefix + name] = each
    return found
