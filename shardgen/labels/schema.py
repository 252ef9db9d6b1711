"""The JSON of a label as structs: the fields that are read. Others are skipped without being
built, and a wrong type ends the reading.
"""

from typing import Any

import msgspec


class Scene(msgspec.Struct, rename={"text": "description"}):
    text: str | None = None
    tc_in: str | None = None
    tc_out: str | None = None


class Caption(msgspec.Struct):
    text: str | None = None
    tc_in: str | None = None
    tc_out: str | None = None


# What stands in a list of captions: an object, a bare sentence, or what says nothing.
Bare = str | float | bool | None
# What some exporters write in the place of an object that is empty.
NoObject = list[Any] | str | float | bool | None


class Generated(msgspec.Struct):
    stt_script: str | None = None
    keyword: Any = None  # no rule uses it
    mid_category: str | None = None
    auto_tags: Any = None
    scene_description_auto: list[Scene | Bare] | None = None


class Source(msgspec.Struct):
    clip_id: str
    source_mbc: str | None = None
    broadcast_date: Any = None  # unknown where it can't be read
    clip_proxy_url: str | None = None
    clip_proxy_thumbnail_url: Any = None  # no rule uses them
    ai_generated_info: Generated | None = None


class Levels(msgspec.Struct):
    object_level: list[Caption | Bare] | None = None
    semantic_level: list[Caption | Bare] | None = None
    application_level: list[Caption | Bare] | None = None


class Captions(msgspec.Struct):
    caption_info: Levels | None = None


# What the label declares about the media is of any type, for the probe knows better: what can't
# be read is unknown, and no reason to lose the label.
class Details(msgspec.Struct):
    length: Any = None
    frame_rate: Any = None
    resolution: Any = None


class MediaInfo(msgspec.Struct):
    media_type: str | None = None
    details: Details | NoObject = None
    resolution: Any = None


class Basic(msgspec.Struct):
    resolution: Any = None


class InnerRaw(msgspec.Struct):
    basic_info: Basic | NoObject = None


class RawData(msgspec.Struct):
    source_media_info: MediaInfo | NoObject = None
    basic_info: Basic | NoObject = None
    raw_data_info: InnerRaw | NoObject = None


class LabelFile(msgspec.Struct):
    source_data_info: Source
    labeling_data_info: Captions | None = None
    raw_data_info: RawData | NoObject = None
