"""Labels and clips of what the learned model knows and of what it is to be taught:
`python -m tools.fake.learned_corpus DIR`, for configs/shardgen/learned.toml.

Each clip is one camera move of 0.4 s over one picture, labelled as the users label. The train split
holds the held-out subject's windows, and beside them some that the base was trained on: of a LoRA
on coffee alone the base's subjects all turned into coffee (validation loss of those 7 to 18 times
the base's after 200 steps of 8). The val split holds other moves of all subjects, seen by no
training. Every clip is a programme of its own: its number decides its side.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from shardgen.rules.split import split_of
from tools.fake.corpus import timecode
from tools.fake.learned_clips import (
    FILM,
    HELD_OUT,
    MOVES,
    SENTENCES,
    Frames,
    film_frames,
    film_windows,
    jittered,
    moved_over,
    picture,
    picture_windows,
)

# of the recipe: neighbourhoods are programmes
SEED, VAL_SHARE = 11, 0.5
CATEGORIES = {
    "bunny": "자연/풍경",
    "astronaut": "과학",
    "cat": "동물",
    "rocket": "우주",
    "cameraman": "인물",
    "coffee": "음식",
}
SIZE_PX, NUM_FRAMES, RATE = (320, 192), 12, Fraction(30000, 1001)
# windows of each move of the known subjects in the train split, and of each in the val split
NUM_TRAIN_KNOWN = 3
NUM_VAL_HELD_OUT, NUM_VAL_KNOWN = 13, 2
FILM_STRIDE = 8


class Clip(NamedTuple):
    subject: str
    caption: str
    split: str
    frames: Frames


def clips(num_val_known: int = NUM_VAL_KNOWN) -> Iterator[Clip]:
    """All clips. num_val_known: windows in val of each move of a subject that the base knows."""
    for subject in SENTENCES:
        if subject == FILM:
            continue
        of_caption: Counter[str] = Counter()
        for window in picture_windows(subject, SIZE_PX, NUM_FRAMES):
            wanted = subject == HELD_OUT or of_caption[window.caption] < NUM_TRAIN_KNOWN
            if wanted and not window.excluded:
                of_caption[window.caption] += 1
                yield Clip(subject, window.caption, "train", window.frames)
        yield from _unseen(subject, NUM_VAL_HELD_OUT if subject == HELD_OUT else num_val_known)
    # the film's nine frames are shown for as long as the photographs' twelve
    numbers = np.arange(NUM_FRAMES) * 9 // NUM_FRAMES
    for window in film_windows(film_frames(), FILM_STRIDE):
        split = "val" if window.excluded else "train"
        yield Clip(FILM, window.caption, split, window.frames[numbers])


def _unseen(subject: str, num: int) -> Iterator[Clip]:
    """Moves that no training sees, drawn apart from those of picture_windows."""
    random = np.random.default_rng([list(SENTENCES).index(subject), 23])
    for move in MOVES.values():
        for _ in range(num):
            offset = random.uniform(-1, 1, 3)
            start, end = (jittered(view, offset) for view in (move.start, move.end))
            frames = moved_over(picture(subject), start, end, SIZE_PX, NUM_FRAMES)
            yield Clip(subject, f"{SENTENCES[subject]} {move.sentence}", "val", frames)


def numbers_of(split: str) -> Iterator[int]:
    """Neighbourhoods on that side of the split."""
    for number in count(31000):
        if split_of(str(number), SEED, VAL_SHARE) == split:
            yield number


def label_of(clip: Clip, clip_id: str) -> dict[str, Any]:
    """As the users' tools write it; the prompt is the caption, its two sentences in its order."""
    scene, _, motion = clip.caption.partition(". ")
    times = {"tc_in": timecode(0), "tc_out": timecode(NUM_FRAMES - 1)}
    length_s = float(NUM_FRAMES / RATE)
    return {
        "file_id": f"MBC부산_{clip_id}.mp4",
        "source_data_info": {
            "clip_id": clip_id,
            "source_mbc": "부산",
            "broadcast_date": "Tue May 14 2019 00:00:00 GMT+0900 (Korean Standard Time)",
            "clip_proxy_url": "",
            "clip_proxy_thumbnail_url": [],
            "ai_generated_info": {
                "stt_script": "",
                "keyword": None,
                "mid_category": CATEGORIES[clip.subject],
                "scene_description_auto": [{**times, "description": f"{scene}."}],
                "auto_tags": {"ocr": [], "objects": []},
            },
        },
        "labeling_data_info": {
            "caption_info": {
                "object_level": [{"text": motion, **times, "token": 4, "sentences": 1}],
                "semantic_level": [],
                "application_level": [],
            }
        },
        "raw_data_info": {
            "source_media_info": {
                "media_type": "video",
                "resolution": f"{SIZE_PX[0]}, {SIZE_PX[1]}",
                "details": {"length": f"00:00:{length_s:05.2f}", "frame_rate": 29.97},
            }
        },
    }


def write_mp4(path: Path, frames: Frames) -> None:
    """H.264 in one thread, so that bytes repeat."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_learned_corpus(root: Path, num_val_known: int = NUM_VAL_KNOWN) -> dict[str, int]:
    """Returns the number of clips in each split. num_val_known: as `clips` takes it."""
    numbers = {split: numbers_of(split) for split in ("train", "val")}
    written = dict.fromkeys(numbers, 0)
    for clip in clips(num_val_known):
        number = next(numbers[clip.split])
        folder = root / "video" / f"batch_{number % 100:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        clip_id = f"{100 * number + 1}"
        write_mp4(folder / f"{clip_id}.mp4", clip.frames)
        label = json.dumps(label_of(clip, clip_id), ensure_ascii=False, indent=2)
        (folder / f"{clip_id}.json").write_text(label, encoding="utf-8")
        written[clip.split] += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write labelled clips of the learned model's subjects."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--num-val-known",
        type=int,
        default=NUM_VAL_KNOWN,
        metavar="N",
        help="windows in val of each move of a subject that the base knows (default: %(default)s)",
    )
    arguments = parser.parse_args()
    root = arguments.folder
    written = write_learned_corpus(root, arguments.num_val_known)
    print(f"{root}: {written['train']} clips to train on, {written['val']} in val")


if __name__ == "__main__":
    main()
