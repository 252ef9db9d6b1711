"""The configuration of the quality report: what each check has to reach. No byte of a shard
depends on it.
"""

import re

import msgspec

TARGET = re.compile(r"(>=|<=) *(\d+(?:\.\d+)?)")


class TargetsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each check of the report has to reach: ">= 99.5" or "<= 25", in the check's unit;
    empty: not set.
    """

    file_validity: str = ""
    format_agreement: str = ""
    size_agreement: str = ""
    length_agreement: str = ""
    rate_agreement: str = ""
    mean_length: str = ""
    over_25_s: str = ""
    total_length: str = ""
    words_per_description: str = ""
    sentences_per_description: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a target that says neither at least nor at most."""
        for name in self.__struct_fields__:
            if (text := getattr(self, name)) and TARGET.fullmatch(text) is None:
                raise ValueError(f'report.targets.{name} = {text!r}: write ">= 99.5" or "<= 25"')


class ReportConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the quality report measures the data by."""

    targets: TargetsConfig = TargetsConfig()
