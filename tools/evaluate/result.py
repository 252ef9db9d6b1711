"""result.json: all that an evaluation says, and the only interface to whatever shows figures. The
dashboard's pages Compare, Quality and Vote read it; paths are relative and stay inside its folder.

Every field has a default, because a file of an older writer lacks some. What was not measured has
no number but says why.
"""

from pathlib import Path

import msgspec

from loader.files import write_atomic

RESULT_FILE = "result.json"
NOT_MEASURED = "not measured"
Value = float | str | None  # a str: not measured


class Variant(msgspec.Struct, frozen=True):
    """What was evaluated: "real", "base" or a LoRA."""

    name: str
    lora: str = ""
    lora_xxh3: str = ""
    difference_levels: float | None = None
    # of the base model's weights (train/model/identity.py); "" of the real clips
    base_xxh3: str = ""


class Metric(msgspec.Struct, frozen=True):
    """One figure of a variant; of one category, or "" for all."""

    name: str
    variant: str
    category: str = ""
    value: Value = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    why: str = ""
    model: str = ""  # extractor or tower, with its hash
    floor: float | None = None  # real against real, half of the real clips on each side
    target: str = ""
    reached: bool | None = None


class Comparison(msgspec.Struct, frozen=True):
    """The paired difference of two variants."""

    metric: str
    variant: str
    against: str = "base"
    category: str = ""
    difference: Value = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    verdict: str = ""


class ResultClip(msgspec.Struct, frozen=True):
    """A clip of an evaluation. `file` is relative to its result.json, inside its folder."""

    variant: str
    file: str
    prompt: str = ""
    prompt_id: str = ""
    category: str = ""
    seed: int = 0


class Result(msgspec.Struct, frozen=True):
    """evaluations/NAME/result.json."""

    name: str = ""
    time: float | str | None = None
    set_hash: str = ""
    num_prompts: int | None = None
    num_seeds: int | None = None
    variants: list[Variant] = []
    metrics: list[Metric] = []
    comparisons: list[Comparison] = []
    clips: list[ResultClip] = []
    pictures: list[str] = []  # plots and contact sheets, relative
    grade: str = ""
    grade_rule: str = ""


def not_measured(
    name: str, variant: str, why: str, category: str = "", model: str = "", target: str = ""
) -> Metric:
    """The row of a figure that is missing, with the reason."""
    return Metric(name, variant, category, value=NOT_MEASURED, why=why, model=model, target=target)


def write_result(folder: Path, result: Result) -> None:
    """Raises ValueError for a path that leaves the folder."""
    for name in (*(clip.file for clip in result.clips), *result.pictures):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name}: paths in {RESULT_FILE} stay inside its folder")
    text = msgspec.json.format(msgspec.json.encode(result), indent=1)
    write_atomic(folder / RESULT_FILE, text + b"\n")


def read_result(folder: Path) -> Result:
    """Raises ValueError where there is none, or none that can be read."""
    try:
        return msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=Result)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{folder / RESULT_FILE}: {error}") from error
