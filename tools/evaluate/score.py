"""What is measured of each clip, one at a time, and kept: `python -m tools.evaluate score`.

    scores/VARIANT.json            numbers of each clip
    scores/VARIANT.NAME.npy        the extractor's features, float32 [N, D]

A file names what it was made from; what is there and was made from the same clips by the same
networks is not made again. Memory holds one clip and the features, whatever the number of clips.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import xxhash
from tqdm import tqdm

from loader.files import write_atomic
from tools.evaluate import towers
from tools.evaluate.clips import BASE, REAL, SCORES, Clip, clips_of, read_mp4, write_npy
from tools.evaluate.config import EvaluateConfig
from tools.evaluate.evaluation_set import EvaluationSet
from tools.evaluate.extractors import Extractor, damaged, self_test
from tools.evaluate.frechet import Features
from tools.evaluate.pictures import measure
from tools.evaluate.towers import Tower


class ClipScores(msgspec.Struct, frozen=True):
    """The numbers of one decoded clip. cosines: with each prompt's caption, in the set's order."""

    prompt_id: str
    seed: int
    num_frames: int
    pictures: dict[str, float]
    cosines: list[float] = []


class Scores(msgspec.Struct, frozen=True):
    """scores/VARIANT.json. made_from: a hash of the clips and of the networks."""

    made_from: str
    clips: list[ClipScores]
    tower: str = ""
    tower_why: str = ""
    extractor: str = ""
    extractor_why: str = ""
    # of captions' sentences, the share that the tower cuts
    truncated_share: float = 0.0


class Networks(NamedTuple):
    """Those that are there, and why those that are not there are not."""

    extractor: Extractor | None
    extractor_why: str
    tower: Tower | None
    tower_why: str


def open_networks(config: EvaluateConfig, device: torch.device) -> Networks:
    """Raises ValueError for a file or folder that is named and can't be used."""
    extractor = Extractor(config.fvd, device) if config.fvd.weights else None
    tower = Tower(config.clip, device) if config.clip.model else None
    return Networks(
        extractor,
        "" if extractor else "fvd.weights is empty",
        tower,
        "" if tower else "clip.model is empty",
    )


def score(config: EvaluateConfig, chosen: EvaluationSet, device: torch.device) -> dict[str, Scores]:
    """Measure every variant. Raises ValueError for networks or clips that can't be used."""
    networks = open_networks(config, device)
    found = {}
    for name in (REAL, BASE, *config.candidates):
        found[name] = _score_variant(config, chosen, networks, name)
    return found


def _score_variant(
    config: EvaluateConfig, chosen: EvaluationSet, networks: Networks, name: str
) -> Scores:
    folder, path = config.folder, config.folder / SCORES / f"{name}.json"
    clips = _decoded(chosen, name)
    made_from = _made_from(config, chosen, clips)
    if path.exists():
        old = msgspec.json.decode(path.read_bytes(), type=Scores)
        if old.made_from == made_from:
            return old
    tower = networks.tower
    captions, truncated_share = [], 0.0
    if tower is not None:
        parts = [towers.sentences(prompt.prompt) for prompt in chosen.prompts]
        captions = [tower.texts(part) for part in parts]
        flat = [sentence for part in parts for sentence in part]
        truncated_share = tower.num_truncated(flat) / len(flat)
    extractor, extractor_why = networks.extractor, networks.extractor_why
    scored: list[ClipScores] = []
    features: list[Features] = []
    spoilt: dict[str, list[Features]] = {"blurred": [], "noise": []}
    for number, clip in enumerate(tqdm(clips, desc=f"score {name}", unit="clip")):
        frames = read_mp4((folder / clip.mp4).read_bytes(), clip.mp4)
        cosines = []
        if tower is not None:
            pictures_ND = tower.frames(frames)
            cosines = [towers.cosine(pictures_ND, caption_MD) for caption_MD in captions]
        if extractor is not None:
            extractor_why = extractor_why or extractor.why_not(len(frames))
        if extractor is not None and not extractor_why:
            features.append(extractor.features(frames))
            if name == REAL:
                for how, of_spoilt in spoilt.items():
                    of_spoilt.append(extractor.features(damaged(frames, how, number)))
        scored.append(
            ClipScores(
                prompt_id=clip.prompt.id,
                seed=clip.seed,
                num_frames=len(frames),
                pictures=measure(frames),
                cosines=[round(value, 6) for value in cosines],
            )
        )
    if extractor is not None and not extractor_why and name == REAL:
        extractor_why = self_test(*(np.stack(x) for x in (features, *spoilt.values())))
    if features:
        write_npy(feature_file(folder, name, config), np.stack(features))
    scores = Scores(
        made_from=made_from,
        clips=scored,
        tower=tower.name if tower else "",
        tower_why=networks.tower_why,
        extractor=extractor.name if extractor else "",
        extractor_why=extractor_why,
        truncated_share=truncated_share,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(scores), indent=1) + b"\n")
    return scores


def feature_file(folder: Path, variant: str, config: EvaluateConfig) -> Path:
    return folder / SCORES / f"{variant}.{config.fvd.name}.npy"


def _made_from(config: EvaluateConfig, chosen: EvaluationSet, clips: Sequence[Clip]) -> str:
    """Of these clips, by the networks that `config` names. Raises ValueError for a clip that is not
    there.
    """
    digest = xxhash.xxh3_128()
    tower = towers.folder_key(config.clip) if config.clip.model else ""
    settings = (chosen.hash, config.fvd if config.fvd.weights else None, tower)
    digest.update(msgspec.json.encode(settings))
    for clip in clips:
        path = config.folder / clip.mp4
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path} is missing; run tools.evaluate generate") from error
    return digest.hexdigest()


def read_scores(
    config: EvaluateConfig, chosen: EvaluationSet, names: Sequence[str]
) -> dict[str, Scores]:
    """Raises ValueError for a variant that was not scored, or whose scores are of other clips or
    networks than those of now.
    """
    found = {}
    for name in names:
        path = config.folder / SCORES / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing; run tools.evaluate score")
        found[name] = msgspec.json.decode(path.read_bytes(), type=Scores)
        if found[name].made_from != _made_from(config, chosen, _decoded(chosen, name)):
            raise ValueError(
                f"{path}: its clips were made again since, or fvd and clip name other networks; "
                f"run tools.evaluate score"
            )
    return found


def _decoded(chosen: EvaluationSet, name: str) -> list[Clip]:
    return [clip for clip in clips_of(chosen, name) if clip.prompt.decoded]


def read_latents(
    folder: Path, clips: Sequence[Clip], pool: Callable[[np.ndarray[Any, Any]], Features]
) -> Features:
    """Float32 [N, D]. Raises ValueError for one that is missing."""
    try:
        return np.stack([pool(np.load(folder / clip.latent)) for clip in clips])
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {error}; run tools.evaluate generate") from error
