"""Free text becomes a file that samples draw beside captions; what can't be drawn is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors import safe_open
from test_train_sampling import ALONE, built

from loader.feed_config import FeedConfig
from loader.walk import Walk
from shardgen.encode.text import TextEncoder
from tools.prompts import main
from train.config import TrainConfig
from train.lora.config import LoRAConfig
from train.model.config import ModelConfig
from train.open_sampler import open_sampler
from train.sampling import SamplesConfig

TEXTS = "# of the harbour\n어시장에서 상인이 생선을 놓는다.\n\n  A tram &amp; a bridge  \n"


@pytest.fixture(scope="module")
def prompts_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "texts.txt").write_text(TEXTS, encoding="utf-8")
    encode(folder / "texts.txt", tiny_checkpoint, folder / "prompts.safetensors")
    return folder / "prompts.safetensors"


def encode(texts: Path, model: Path, output: Path) -> None:
    main([str(texts), "--model", str(model), "--output", str(output)])


def config_of(tiny_checkpoint: Path, tiny_dataset: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        output=str(output),
        model=ModelConfig(path=str(tiny_checkpoint), dtype="float32"),
        data=FeedConfig(datasets=[str(tiny_dataset)], num_threads=1),
        lora=LoRAConfig(rank=2, alpha=2.0),
        samples=SamplesConfig(num_clips=0, num_steps=1),
        num_steps=1,
        global_batch=1,
    )


def test_the_rows_are_those_of_the_models_encoder(
    tiny_checkpoint: Path, prompts_file: Path
) -> None:
    prompts = ["어시장에서 상인이 생선을 놓는다.", "A tram & a bridge", ""]
    expected = TextEncoder(tiny_checkpoint, "cpu", torch.float32).encode(prompts, 1).texts
    with safe_open(prompts_file, framework="np") as file:
        for name, prompt in zip(("0", "1", "empty"), prompts, strict=True):
            assert np.array_equal(file.get_tensor(name), expected[prompt].rows)


def test_a_run_draws_named_captions_and_then_the_texts(
    tiny_checkpoint: Path, tiny_dataset: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, tiny_dataset, tmp_path)
    with Walk(config.data, "val", ALONE.device) as walk:
        place = next(place for place in walk.places if place.bucket.num_frames > 1)
        caption = walk.meta(place).prompt
    samples = replace(
        config.samples, keys=[place.key], prompts=str(prompts_file), shape="96x64x5", seed=7
    )
    sampler = open_sampler(built(replace(config, samples=samples)))
    assert sampler is not None
    clips = sampler.sample(0).clips
    assert [clip.prompt for clip in clips] == [
        caption,
        "어시장에서 상인이 생선을 놓는다.",
        "A tram & a bridge",
    ]
    assert [clip.key for clip in clips] == [place.key, "prompt01", "prompt02"]
    assert {clip.shape for clip in clips} == {"96x64x5"}
    assert len({clip.seed for clip in clips}) == 3


def test_the_texts_alone_will_do_and_a_key_of_another_split_is_refused(
    tiny_checkpoint: Path, tiny_dataset: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint, tiny_dataset, tmp_path)
    samples = replace(config.samples, prompts=str(prompts_file), shape="96x64x5")
    run = built(replace(config, samples=samples))
    assert open_sampler(run) is not None
    # nothing to draw at all
    assert open_sampler(built(config)) is None
    with Walk(config.data, "train", ALONE.device) as walk:
        key = walk.places[0].key
    for keys in (["0" * 32], [key]):
        with pytest.raises(ValueError, match=rf"samples\.keys: {keys[0]} are no samples of the"):
            open_sampler(built(replace(config, samples=replace(samples, keys=keys))))


def test_a_file_of_another_models_encoder_is_refused(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    from tools.prompts import write

    path = tmp_path / "wide.safetensors"
    write(path, ["a"], {"a": np.zeros((2, 64), np.float16), "": np.zeros((1, 64), np.float16)})
    config = config_of(tiny_checkpoint, tiny_dataset, tmp_path)
    samples = replace(config.samples, prompts=str(path), shape="96x64x5")
    with pytest.raises(ValueError, match=r"its rows are 64 wide, the model's text_dim is 32"):
        open_sampler(built(replace(config, samples=samples)))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "# nothing\n\n", r"a\.txt: there is no prompt in it"),
        ("a.txt", "one\ntwo\none \n", r"prompts 1 and 3 are the same: one"),
        ("a.txt", "한 " * 600, r"prompt 1 has \d+ tokens, the model takes 512"),
        ("a.toml", 'prompt = ["a"]', r"a\.toml: .*unknown field.*it takes prompts = "),
        ("a.toml", "prompts = [", r"a\.toml: "),
        ("a.toml", 'prompts = ["a", " "]', r"prompt 2 is empty"),
        ("a.txt", "\n".join(map(str, range(100))), r"100 prompts; at most 99"),
    ],
)
def test_texts_that_cannot_be_drawn_are_refused_before_the_encoder_is_loaded(
    name: str,
    text: str,
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tools.prompts.TextEncoder", None)
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        encode(tmp_path / name, tiny_checkpoint, tmp_path / "out.safetensors")


def test_other_inputs_are_named_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"absent\.txt: can't be read as UTF-8"):
        encode(tmp_path / "absent.txt", tiny_checkpoint, tmp_path / "out")
    (tmp_path / "korean.txt").write_bytes("한글".encode("cp949"))
    with pytest.raises(SystemExit, match=r"korean\.txt: can't be read as UTF-8"):
        encode(tmp_path / "korean.txt", tiny_checkpoint, tmp_path / "out")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(SystemExit, match=r"tokenizer: no such folder; --model takes"):
        encode(tmp_path / "a.txt", tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"nowhere: no such folder for --output"):
        encode(tmp_path / "a.txt", tiny_checkpoint, tmp_path / "nowhere" / "out")
    with pytest.raises(SystemExit, match=r"is a folder; name a file in it"):
        encode(tmp_path / "a.txt", tiny_checkpoint, tmp_path)
