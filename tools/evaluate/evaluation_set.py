"""Which prompts are evaluated: captions of the val split, the categories in turn, each text once.
Written to set.json with a hash, so that two evaluations of one hash are comparable.
"""

from collections.abc import Collection
from pathlib import Path

import msgspec
import xxhash

from loader.batch import Batch
from loader.files import write_atomic
from loader.order import sample_seed
from loader.shuffle import hash64
from loader.walk import Walk, WalkPlace
from tools.evaluate.config import EvaluateConfig
from train.windows import Window, spread

SET_FILE = "set.json"
NUM_REFERENCE = 2048  # real latents at most


class Prompt(msgspec.Struct, frozen=True):
    """One caption. key: of the real window it comes from. decoded: to pictures, too."""

    id: str
    key: str
    prompt: str
    category: str
    programme: str
    shape: str
    decoded: bool


class EvaluationSet(msgspec.Struct, frozen=True):
    """Everything that decides a clip but the weights. hash: of all other fields."""

    prompts: list[Prompt]
    num_seeds: int
    seed: int
    num_steps: int
    shift: float
    guidance: float
    dtype: str
    # keys of real windows of the same shape, for distances of latents
    reference: list[str]
    hash: str = ""
    # of these shapes instead of `shift`; left out of the hash where there are none
    shifts: dict[str, float] = {}

    def shift_of(self, prompt: Prompt) -> float:
        """Of the clips of this prompt: that of its shape."""
        return self.shifts.get(prompt.shape, self.shift)

    def noise_seed(self, prompt: Prompt, number: int) -> int:
        """Of the clip's noise: the same for every variant."""
        return sample_seed(self.seed, number, prompt.key)


def choose_set(walk: Walk, config: EvaluateConfig) -> EvaluationSet:
    """Prompts of videos, in the order of a hash of their keys. Raises ValueError without any."""
    wanted, seed = config.set, config.set.seed
    videos = [place for place in walk.places if place.bucket.num_frames > 1]
    hashed = sorted(videos, key=lambda place: hash64(seed, place.key))
    candidates: dict[str, Window] = {}
    if wanted.categories:
        category_of = {place: walk.meta(place).category for place in hashed}
        known = set(category_of.values())
        if unknown := sorted(set(wanted.categories) - known):
            raise ValueError(
                f"set.categories: the val split has no videos of {', '.join(unknown)}; it has some "
                f"of {', '.join(sorted(known))}"
            )
        hashed = [place for place in hashed if category_of[place] in wanted.categories]
    for place in hashed[: 64 * wanted.num_prompts]:
        meta = walk.meta(place)
        if meta.prompt not in candidates:
            candidates[meta.prompt] = Window(
                meta.key, meta.category, meta.programme, meta.prompt, place
            )
    windows = spread(list(candidates.values()), wanted.num_prompts)
    if not windows:
        raise ValueError(
            f"{', '.join(config.datasets)}: the val split has no videos to take prompts from"
        )
    decoded = decoded_keys(windows, wanted.num_decoded)
    prompts = [
        Prompt(
            id=window.key[:12],
            key=window.key,
            prompt=window.prompt,
            category=window.category,
            programme=window.programme,
            shape=str(window.place.bucket),
            decoded=window.key in decoded,
        )
        for window in windows
    ]
    shapes = {prompt.shape for prompt in prompts}
    reference = [place.key for place in hashed if str(place.bucket) in shapes][:NUM_REFERENCE]
    sampling = config.sampling
    found = EvaluationSet(
        prompts=prompts,
        num_seeds=wanted.num_seeds,
        seed=seed,
        num_steps=sampling.num_steps,
        shift=sampling.shift,
        guidance=sampling.guidance,
        dtype=sampling.dtype,
        reference=sorted(reference),
        shifts={shape: sampling.shifts[shape] for shape in sorted(shapes & sampling.shifts.keys())},
    )
    fields = msgspec.to_builtins(found)
    if not found.shifts:
        # the hash of versions that knew one shift
        del fields["shifts"]
    digest = xxhash.xxh3_128_hexdigest(msgspec.json.encode(fields))
    return msgspec.structs.replace(found, hash=digest)


def decoded_keys(windows: list[Window], num_decoded: int) -> set[str]:
    """The keys of `num_decoded` windows, the categories in turn; of all if it is 0."""
    if num_decoded == 0:
        return {window.key for window in windows}
    return {window.key for window in spread(windows, num_decoded)}


class Windows:
    """The val split's samples by key."""

    def __init__(self, walk: Walk):
        self._walk = walk
        self._places: dict[str, WalkPlace] = {place.key: place for place in walk.places}

    def batch(self, key: str, drop_caption: bool = False) -> Batch:
        return self._walk.batch(self._places[key], is_i2v=False, seed=0, drop_caption=drop_caption)

    def category(self, key: str) -> str:
        return self._walk.meta(self._places[key]).category

    def members(self, key: str, names: Collection[str]) -> dict[str, bytes]:
        return self._walk.members(self._places[key], names)


def read_set(folder: Path) -> EvaluationSet | None:
    """None where there is none yet. Raises ValueError for one that can't be read."""
    path = folder / SET_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=EvaluationSet)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: {error}") from error


def write_set(folder: Path, chosen: EvaluationSet) -> None:
    """Raises ValueError where another set has been begun: its clips would be mixed with ours."""
    old = read_set(folder)
    if old is not None and old.hash != chosen.hash:
        raise ValueError(
            f"{folder}: holds clips of another evaluation set ({old.hash[:8]}, now "
            f"{chosen.hash[:8]}); choose another output, or delete it"
        )
    if old is None:
        text = msgspec.json.format(msgspec.json.encode(chosen), indent=1)
        write_atomic(folder / SET_FILE, text + b"\n")
