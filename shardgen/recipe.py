"""What decides the bytes of a dataset, as data: the rules, the models by their content, and the
packages by version.

It goes into the manifest, and its hash, the recipe_id, ties a dataset to one way of making it:
shards of two recipes never share a folder. Left out: how many workers there were and where the
files lay, because these decide nothing.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loader.config import ConfigError
from loader.files import file_xxh3
from loader.identity import folder_xxh3

PACKAGES = ("av", "ftfy", "numpy", "pillow", "tokenizers", "torch", "transformers", "zstandard")
MODEL_PARTS = ("text_encoder", "tokenizer", "vae")  # the transformer takes no part in a dataset


def full_recipe(
    rules: dict[str, Any],
    model: Path,
    recall: Callable[[str], str],
    remember: Callable[[str, str], None],
) -> dict[str, Any]:
    """The recipe as plain JSON types: `rules` is what of the configuration decides bytes.
    `recall` and `remember` store hashes of model files from run to run.

    Raises ConfigError if the model folder lacks a part.
    """

    # Gigabytes of weights are hashed once, as long as size and mtime stay.
    def recalled_xxh3(path: Path) -> str:
        status = path.stat()
        name = f"model {path.resolve()} {status.st_size} {status.st_mtime_ns}"
        content = recall(name)
        if not content:
            content = file_xxh3(path)
            remember(name, content)
        return content

    models = {}
    for part in MODEL_PARTS:
        folder = model / part
        models[part] = folder_xxh3(folder, recalled_xxh3)
        if not models[part]:
            raise ConfigError(
                f"encode.model: {folder} is missing or empty; give the folder of a Wan model in "
                f"diffusers layout, with {', '.join(MODEL_PARTS)}"
            )
    packages = {name: version(name) for name in PACKAGES}
    return rules | {"models": models, "packages": packages}
