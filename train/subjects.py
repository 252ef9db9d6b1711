"""What samples are made of: captions of the val split, or texts that tools.prompts has encoded."""

from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loader.dataset import stored_latents
from loader.feed_config import FeedConfig
from loader.models import ModelKind
from loader.shape import LatentLayout
from loader.walk import Walk, WalkPlace
from train.denoise import Schedule, schedule_steps
from train.flow import NoiseLaws
from train.sampling import SamplesConfig, Subject
from train.windows import Window, choose_windows, window_of

PROMPTS_KEY = "prompts"  # in the metadata of a file of tools.prompts: the texts, as JSON
EMPTY_KEY = "empty"


class Subjects(NamedTuple):
    """empty_SD: UMT5 rows of "", which guidance is steered away from."""

    subjects: list[Subject]
    empty_SD: Tensor


def check_samples(
    config: SamplesConfig, data: FeedConfig, kind: ModelKind, laws: NoiseLaws, text_dim: int
) -> None:
    """Can the clips that are asked for be made? Told before there is a model: of the val split only
    the keys are read, and those only where the configuration names some. text_dim: the model's.
    Raises ValueError, DatasetError.
    """
    if config.every == 0:
        return
    if kind.condition or laws.expert == "low":
        _refuse_other_shapes(config, kind, laws)
    if config.shape:
        kind.layout.parse(config.shape)
    if config.keys:
        with open_val(data, kind, "cpu") as walk:
            _places(walk, config.keys)
    if config.prompts:
        subjects_of_file(Path(config.prompts), config, kind.layout, text_dim)
    # with a shift for each shape it depends on what is chosen of the split
    if laws.expert and not laws.config.shifts:
        shift = kind.shift if laws.config.shift is None else laws.config.shift
        # raises where no step is left for the expert
        schedule_steps(Schedule(config.num_steps, shift, 1.0, laws.expert, laws.boundary))


def _refuse_other_shapes(config: SamplesConfig, kind: ModelKind, laws: NoiseLaws) -> None:
    """What a clip starts from is stored in the dataset, for the clip's own shape."""
    why = f"{kind.name} starts from a clip's first frame"
    if laws.expert == "low":
        why = "the low-noise expert starts from a clip with noise"
    for key in ("prompts", "shape"):
        if value := getattr(config, key):
            raise ValueError(
                f'samples.{key} = "{value}": {why}, as the val split holds it; leave the key out, '
                f"or set samples.every = 0"
            )


def open_val(data: FeedConfig, kind: ModelKind, device: torch.device | str) -> Walk:
    """The val split as samples read it."""
    return Walk(stored_latents(data), "val", device, reads_given=bool(kind.condition))


def subjects_of_split(
    walk: Walk,
    config: SamplesConfig,
    layout: LatentLayout,
    *,
    image_to_video: bool,
    starts_from_clips: bool = False,
) -> Subjects:
    """Captions of a split: those of `samples.keys`, or chosen ones, of videos where it has any.
    With `image_to_video` every second clip starts from its first frame, unless that has another
    shape than `samples.shape`. A walk that reads what I2V-A14B is given makes all of them image to
    video. starts_from_clips: for the low-noise expert. Raises ValueError for a key that the split
    does not have.
    """
    shape = layout.parse(config.shape) if config.shape else None
    subjects = []
    windows = _windows(walk, config)
    for number, window in enumerate(windows):
        batch = walk.batch(window.place, is_i2v=False, seed=0)
        bucket = shape or batch.bucket
        from_frame = image_to_video and number % 2 == 1 and bucket.num_frames > 1
        first_frame_C1hw = None
        if from_frame and bucket == batch.bucket and batch.given_BCTHW is None:
            first_frame_C1hw = batch.latent_BCTHW[0, :, :1].float()
        subject = Subject(
            key=window.key,
            prompt=window.prompt,
            bucket=bucket,
            text_SD=batch.text_BSD[0],
            first_frame_C1hw=first_frame_C1hw,
            given_CThw=None if batch.given_BCTHW is None else batch.given_BCTHW[0],
            start_CThw=batch.latent_BCTHW[0] if starts_from_clips else None,
        )
        subjects.append(subject)
    empty = walk.batch(windows[0].place, is_i2v=False, seed=0, drop_caption=True)
    return Subjects(subjects, empty.text_BSD[0])


def _windows(walk: Walk, config: SamplesConfig) -> list[Window]:
    if not config.keys:
        videos = [place for place in walk.places if place.bucket.num_frames > 1]
        return choose_windows(walk, config.num_clips, config.seed, videos or walk.places)
    return [window_of(walk, place) for place in _places(walk, config.keys)]


def _places(walk: Walk, keys: list[str]) -> list[WalkPlace]:
    """Where the samples of `samples.keys` are. Raises ValueError."""
    if not walk.places:
        raise ValueError("samples.keys: the datasets have no val split to take them from")
    places = {place.key: place for place in walk.places}
    missing = [key for key in keys if key not in places]
    if missing:
        raise ValueError(
            f"samples.keys: {', '.join(missing)} are no samples of the val split; "
            f"`shardgen inspect CLIP_ID --dataset DATASET` shows the keys of a clip"
        )
    return [places[key] for key in keys]


def subjects_of_file(
    path: Path, config: SamplesConfig, layout: LatentLayout, text_dim: int
) -> Subjects:
    """Texts of tools.prompts, at `samples.shape`. Raises ValueError for a file or a shape that
    can't be used, or texts that another model's encoder has read.
    """
    if not config.shape:
        raise ValueError(
            "samples.shape is empty: a file of prompts has no shapes, so name one, for example "
            '"832x480x33"'
        )
    bucket = layout.parse(config.shape)
    try:
        with safe_open(path, framework="pt") as file:
            texts = msgspec.json.decode(file.metadata()[PROMPTS_KEY], type=list[str])
            rows = [file.get_tensor(str(number)) for number in range(len(texts))]
            empty_SD = file.get_tensor(EMPTY_KEY)
    except (OSError, SafetensorError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise ValueError(
            f"samples.prompts = {path}: not a file of tools.prompts ({error}); make one with "
            f"python -m tools.prompts"
        ) from error
    if (width := empty_SD.shape[1]) != text_dim:
        raise ValueError(
            f"samples.prompts = {path}: its rows are {width} wide, the model's text_dim is "
            f"{text_dim}; encode it with this model, by python -m tools.prompts"
        )
    named: list[Subject] = []
    for number, (text, rows_SD) in enumerate(zip(texts, rows, strict=True), start=1):
        named.append(Subject(f"prompt{number:02d}", text, bucket, rows_SD))
    return Subjects(named, empty_SD)
