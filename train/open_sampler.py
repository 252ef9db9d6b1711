"""The sampler of a run, from its configuration."""

import logging
from pathlib import Path

from train.denoise import Decoder, schedule_steps
from train.run import Run
from train.sampling import Sampler, schedule_of
from train.subjects import Subjects, open_val, subjects_of_file, subjects_of_split

log = logging.getLogger(__name__)


def open_sampler(run: Run) -> Sampler | None:
    """None if `samples.every` is 0, or, with a warning, if there is nothing to sample: neither a
    val split nor a file of prompts, or no decoder. Raises ValueError where no step is left for an
    expert; what else can't be used, setup.build has refused.
    """
    config = run.config
    if config.samples.every == 0:
        return None
    model_dir = Path(config.model.path)
    subjects = _subjects(run)
    missing = ""
    if subjects is None:
        captions = config.samples.num_clips or config.samples.keys
        why = "the datasets have no val split" if captions else "samples.num_clips = 0"
        missing = f"{why} and samples.prompts is empty"
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
        # a run that has written no checkpoint yet may be started again with another one
        base_identity=(run.base_weights, config.lora.base, config.model.dtype),
        uneven=run.uneven,
    )


def _subjects(run: Run) -> Subjects | None:
    """Captions of the val split, then texts of a file; None where there are neither."""
    config, device, layout = run.config, run.world.device, run.kind.layout
    samples = config.samples
    starts_from_clips = run.laws.expert == "low"
    found: list[Subjects] = []
    if samples.num_clips or samples.keys:
        with open_val(config.data, run.kind, device) as walk:
            if walk.places:
                captions = subjects_of_split(
                    walk,
                    samples,
                    layout,
                    image_to_video=config.data.i2v_share > 0,
                    starts_from_clips=starts_from_clips,
                )
                found.append(captions)
    if samples.prompts:
        text_dim = run.model.config.text_dim
        texts = subjects_of_file(Path(samples.prompts), samples, layout, text_dim)
        on_device = [each._replace(text_SD=each.text_SD.to(device)) for each in texts.subjects]
        found.append(Subjects(on_device, texts.empty_SD.to(device)))
    if not found:
        return None
    return Subjects([each for part in found for each in part.subjects], found[0].empty_SD)
