"""The sampler of a run, from its configuration."""

import logging
from pathlib import Path

from msgspec.structs import replace

from loader.shape import WAN22
from loader.walk import Walk
from train.denoise import Decoder
from train.run import Run
from train.sampling import Sampler
from train.setup import FPS
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
    return Sampler(
        model=run.model,
        adapters=run.adapters,
        attention=run.kernels.attention,
        decoder=Decoder(model_dir, run.world.device),
        subjects=subjects.subjects,
        empty_SD=subjects.empty_SD,
        layout=WAN22,
        flow=config.flow,
        fps=FPS,
        config=config.samples,
        output=config.output_dir,
        world=run.world,
    )


def _subjects(run: Run) -> Subjects | None:
    config, device = run.config, run.world.device
    if config.samples.prompts:
        found = subjects_of_file(Path(config.samples.prompts), config.samples, WAN22)
        on_device = [
            subject._replace(text_SD=subject.text_SD.to(device)) for subject in found.subjects
        ]
        return Subjects(on_device, found.empty_SD.to(device))
    with Walk(replace(config.data, condition="latent"), "val", device) as walk:
        if not walk.places:
            return None
        image_to_video = config.data.i2v_share > 0
        return subjects_of_split(walk, config.samples, WAN22, image_to_video=image_to_video)
