"""Encode texts for samples in training: python -m tools.prompts TEXTS --model MODEL --output FILE

A run loads no text encoder, so free text is encoded once, by the UMT5 of the model that will be
trained, and `samples.prompts = "FILE"` names the result. TEXTS has one prompt a line (empty lines
and lines that begin with # are left out), or is TOML, for prompts with line breaks and a name:

    prompts = ["어시장에서 상인이 생선을 얼음 위에 놓는다.", "A tram crosses a bridge at night."]

Prompts are cleaned as those of a dataset are. FILE is safetensors: float16 [tokens, width] under
"0", "1", ..., the empty prompt under "empty", and the texts in the metadata.
"""

import argparse
import sys
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import torch
import transformers
from safetensors.numpy import save
from transformers import AutoTokenizer

from loader.files import told, write_atomic
from loader.sample import MAX_TEXT_TOKENS
from shardgen.encode.text import TextEncoder, TextError
from shardgen.rules.prompt import prompt_clean
from tools.device import add_device
from train.subjects import EMPTY_KEY, PROMPTS_KEY

MAX_PROMPTS = 99  # a clip of each at every event: more would be a mistake


class _Toml(msgspec.Struct, forbid_unknown_fields=True):
    prompts: list[str]


class PromptsError(ValueError):
    """Texts that can't be used; the message names the file, the prompt and what to do."""


def read_prompts(path: Path) -> list[str]:
    """The cleaned prompts of a text or TOML file. Raises PromptsError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path}: can't be read as UTF-8 text ({error})") from error
    if path.suffix.lower() == ".toml":
        try:
            raw = msgspec.convert(tomllib.loads(text), _Toml).prompts
        except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise PromptsError(f'{path}: {error}; it takes prompts = ["...", "..."]') from error
    else:
        lines = [line.strip() for line in text.splitlines()]
        raw = [line for line in lines if line and not line.startswith("#")]
    prompts = [prompt_clean(prompt) for prompt in raw]
    if not prompts:
        raise PromptsError(f"{path}: there is no prompt in it")
    if len(prompts) > MAX_PROMPTS:
        raise PromptsError(f"{path}: {len(prompts)} prompts; at most {MAX_PROMPTS}, a clip of each")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise PromptsError(f"{path}: prompt {number} is empty")
        if prompt in prompts[: number - 1]:
            first = prompts.index(prompt) + 1
            raise PromptsError(f"{path}: prompts {first} and {number} are the same: {prompt[:80]}")
    return prompts


def check_lengths(prompts: list[str], model_dir: Path) -> None:
    """Before the encoder is loaded. Raises PromptsError for a prompt that it would cut, and for a
    folder without a tokenizer.
    """
    folder = model_dir / "tokenizer"
    if not folder.is_dir():
        raise PromptsError(f"{folder}: no such folder; --model takes a folder in diffusers layout")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for number, prompt in enumerate(prompts, start=1):
        num_tokens = len(tokenizer(prompt).input_ids)
        if num_tokens > MAX_TEXT_TOKENS:
            raise PromptsError(
                f"prompt {number} has {num_tokens} tokens, the model takes {MAX_TEXT_TOKENS} with "
                f"the end mark: shorten it ({prompt[:80]} ...)"
            )


def encode(
    prompts: list[str], model_dir: Path, device: str, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """{prompt: float16 [tokens, width]}, "" among them; in float32 those on which float16
    saturates. Raises TextError.
    """
    rows: dict[str, np.ndarray] = {}
    left = [*prompts, ""]
    for precision in dict.fromkeys((dtype, torch.float32)):
        encoder = TextEncoder(model_dir, device, precision)
        encoder.model.to(device)
        # one by one, so that a prompt's rows do not depend on the others
        encoded = encoder.encode(left, batch_size=1)
        rows |= {prompt: text.rows for prompt, text in encoded.texts.items()}
        left = encoded.saturated
        if not left:
            break
        print(
            f"prompts: float16 overflows on {len(left)} texts, which are encoded in float32",
            file=sys.stderr,
        )
    return rows


def write(path: Path, prompts: list[str], rows: dict[str, np.ndarray]) -> None:
    """The file that `samples.prompts` names. Raises OSError."""
    tensors = {str(number): rows[prompt] for number, prompt in enumerate(prompts)}
    tensors[EMPTY_KEY] = rows[""]
    metadata = {PROMPTS_KEY: msgspec.json.encode(prompts).decode()}
    write_atomic(path, save(tensors, metadata))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder in diffusers layout")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float16" if torch.cuda.is_available() else "float32",
    )
    arguments = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        prompts = read_prompts(arguments.texts)
        if not arguments.output.parent.is_dir():
            raise PromptsError(f"{arguments.output.parent}: no such folder for --output")
        if arguments.output.is_dir():
            raise PromptsError(f"--output {arguments.output}: is a folder; name a file in it")
        check_lengths(prompts, arguments.model)
        dtype = getattr(torch, arguments.dtype)
        rows = encode(prompts, arguments.model, arguments.device, dtype)
        write(arguments.output, prompts, rows)
    except (PromptsError, TextError, OSError) as error:
        sys.exit(f"prompts: {told(error)}")
    print(
        f'{arguments.output}: {len(prompts)} prompts; samples.prompts = "{arguments.output}" and '
        f'samples.shape = "WIDTHxHEIGHTxFRAMES" draw them'
    )


if __name__ == "__main__":
    main()
