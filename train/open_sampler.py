"""The sampler of a run, from its configuration."""

import logging
from pathlib import Path

from msgspec.structs import replace

from loader.walk import Walk
from train.denoise import Decoder, schedule_steps
from train.run import Run
from train.sampling import Sampler, schedule_of
from train.subjects import Subjects, subjects_of_file, subjects_of_split

log = logging.getLogger(__name__)


def open_sampler(run: Run) -> Sampler | None:
    """None if `samples.every` is 0, or, with a warning, if there is nothing to sample: neither a
    val split nor a file of prompts, or no decoder. Raises ValueError for a file of prompts or a
    shape that can't be used.
    """
    config = run.config
    if config.samples.every == 0:
        return None
    model_dir = Path(config.model.path)
    subjects = _subjects(run)
    missing = "" if subjects else "the datasets have no val split and samples.prompts is empty"
    if not (model_dir / "vae" / "config.json").exists():
        missing = f"{model_dir / 'vae'} is missing, and with it the decoder"
    if missing or subjects is None:
        if run.world.is_main:
            log.warning("samples: none are made, because %s", missing)
        return None
    for subject in subjects.subjects:
        # raises where no step is left for an expert
        schedule_steps(schedule_of(config.samples, run.laws, subject.bucket))
    return Sampler(
        model=run.model,
        adapters=run.adapters,
        attention=run.kernels.attention,
        decoder=Decoder(model_dir, run.world.device),
        subjects=subjects.subjects,
        empty_SD=subjects.empty_SD,
        layout=run.kind.layout,
        laws=run.laws,
        fps=run.kind.fps,
        config=config.samples,
        output=config.output_dir,
        world=run.world,
        uneven=run.uneven,
    )


def _subjects(run: Run) -> Subjects | None:
    """Captions of the val split, then texts of a file; None where there are neither."""
    config, device, layout = run.config, run.world.device, run.kind.layout
    samples = config.samples
    starts_from_clips = run.laws.expert == "low"
    if run.kind.condition or starts_from_clips:
        _refuse_other_shapes(run)
    found: list[Subjects] = []
    if samples.num_clips or samples.keys:
        data, reads_given = replace(config.data, condition="latent"), bool(run.kind.condition)
        with Walk(data, "val", device, reads_given=reads_given) as walk:
            if walk.places:
                captions = subjects_of_split(
                    walk,
                    samples,
                    layout,
                    image_to_video=config.data.i2v_share > 0,
                    starts_from_clips=starts_from_clips,
                )
                found.append(captions)
            elif samples.keys:
                raise ValueError("samples.keys: the datasets have no val split to take them from")
    if samples.prompts:
        texts = subjects_of_file(Path(samples.prompts), samples, layout)
        width, text_dim = texts.empty_SD.shape[1], run.model.config.text_dim
        if width != text_dim:
            raise ValueError(
                f"samples.prompts = {samples.prompts}: its rows are {width} wide, the model's "
                f"text_dim is {text_dim}; encode it with this model, by python -m tools.prompts"
            )
        on_device = [each._replace(text_SD=each.text_SD.to(device)) for each in texts.subjects]
        found.append(Subjects(on_device, texts.empty_SD.to(device)))
    if not found:
        return None
    return Subjects([each for part in found for each in part.subjects], found[0].empty_SD)


def _refuse_other_shapes(run: Run) -> None:
    """What a clip starts from is stored in the dataset, for the clip's own shape."""
    why = f"{run.kind.name} starts from a clip's first frame"
    if run.laws.expert == "low":
        why = "the low-noise expert starts from a clip with noise"
    for key in ("prompts", "shape"):
        if value := getattr(run.config.samples, key):
            raise ValueError(
                f'samples.{key} = "{value}": {why}, as the val split holds it; leave the key out, '
                f"or set samples.every = 0"
            )
