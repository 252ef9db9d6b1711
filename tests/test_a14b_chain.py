"""A14B through the whole chain, tiny: footage to shards, a run for each expert, their files, and
diffusers' pipeline with both, text to video and image to video.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors import safe_open
from trainer_runs import train_here

from loader.feed_config import FeedConfig
from loader.manifest import read_manifest
from loader.models import FIRST_FRAME_AND_GREY, KINDS, TRANSFORMER_OF, Expert
from loader.shape import WAN21
from shardgen.cli import main as shardgen
from tools.applied import NotAppliedError
from tools.generate import Options, compare, files_by_transformer
from train.checkpoint import CheckpointConfig
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora import files
from train.lora.config import LoRAConfig
from train.lora.start import start_from
from train.model.attention import choose_attention
from train.model.config import ModelConfig
from train.model.load import load_transformer
from train.optim import OptimConfig
from train.records import SAMPLES_FILE, VALIDATION_FILE, ValidationRecord, read_records
from train.sampling import SamplesConfig
from train.validate import ValidationConfig

TinyModel = Callable[[str], Path]
EXPERTS: tuple[Expert, ...] = ("high", "low")
PIPELINES = {"t2v-a14b": WanPipeline, "i2v-a14b": WanImageToVideoPipeline}
# as the config files in configs/shardgen have it, but for sizes
RECIPE = """
output = "{output}"
[labels]
root = "{corpus}"
sample_fraction = 0.5
[filters]
media_types = ["video"]
min_caption_chars = 50
[split]
val_share = 0.5
[windows]
buckets = ["80x48x9", "48x80x9"]
fps = 16.0
samples_per_shard = 8
[encode]
model = "{model}"
condition = "first_frame_and_grey"
"""


@pytest.fixture(scope="module")
def dataset(
    tiny_model: TinyModel, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built for image to video: text to video trains on it too."""
    folder = tmp_path_factory.mktemp("a14b")
    recipe = folder / "a14b.toml"
    model = tiny_model("i2v-a14b")
    recipe.write_text(RECIPE.format(output=folder / "tiny", corpus=tiny_corpus, model=model))
    assert shardgen(["build", str(recipe)]) == 0
    assert shardgen(["verify", str(folder / "tiny"), "--workers", "1"]) == 0
    return folder / "tiny"


def test_the_manifest_says_whose_latents_these_are(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert (manifest.format_version, manifest.layout) == (2, WAN21)
    assert manifest.condition == FIRST_FRAME_AND_GREY
    assert all(manifest.splits[split] for split in ("train", "val"))


def run_of(model: Path, dataset: Path, expert: Expert, i2v_share: float) -> TrainConfig:
    return TrainConfig(
        output="",
        # one of the two runs has its weights in the host's memory, which changes no bit
        model=ModelConfig(
            path=str(model),
            expert=expert,
            dtype="float32",
            placement="streamed" if expert == "low" else "resident",
        ),
        data=FeedConfig(datasets=[str(dataset)], i2v_share=i2v_share, num_threads=1),
        num_steps=3,
        global_batch=2,
        lora=LoRAConfig(targets=list(lora.TARGETS), rank=2, alpha=6.0),
        optim=OptimConfig(lr=3e-2, warmup_steps=0),
        validation=ValidationConfig(every=3, num_windows=2, num_train_windows=0),
        samples=SamplesConfig(every=3, num_clips=1, num_steps=8),
        checkpoint=CheckpointConfig(every=3),
    )


class Trained:
    """Both runs of one model, and their files."""

    def __init__(self, kind: str, model: Path, dataset: Path, folder: Path):
        self.kind, self.model = kind, model
        self.outputs = {expert: folder / f"run_{expert}" for expert in EXPERTS}
        for expert, output in self.outputs.items():
            train_here(run_of(model, dataset, expert, float(kind.startswith("i2v"))), output)

    def file(self, expert: Expert, number: int = 0) -> Path:
        """number: 0 diffusers', 1 ComfyUI's."""
        return self.outputs[expert] / files.result_files(expert)[number]


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def trained(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    return Trained(request.param, tiny_model(request.param), dataset, folder)


def test_each_run_names_its_expert_and_says_where_it_was_measured(trained: Trained) -> None:
    for expert, output in trained.outputs.items():
        names = {path.name for path in output.glob("*.safetensors")}
        assert names == {
            f"lora_{expert}_noise.safetensors",
            f"lora_{expert}_noise_comfyui.safetensors",
        }
        step = f"{output.name}-{expert}_noise-step-00000003"
        folder = output / "checkpoints" / "step-00000003"
        assert {f"{step}.safetensors", f"{step}-comfyui.safetensors"} <= {
            path.name for path in folder.iterdir()
        }
        with safe_open(trained.file(expert), framework="pt") as file:
            assert file.metadata()["newsreel_expert"] == expert
        for record in read_records(output / VALIDATION_FILE, ValidationRecord):
            assert record.interval is not None
            assert (record.interval[1] == 1.0) == (expert == "high")
        sampled = json.loads((output / "samples/step-00000003" / SAMPLES_FILE).read_bytes())
        assert f"the {expert}-noise expert alone" in sampled["shows"]
        assert sampled["clips"][0]["task"] == trained.kind[:3]
        assert sampled["clips"][0]["mean_difference_levels"] > 0


@pytest.mark.parametrize("number", [0, 1], ids=["diffusers", "comfyui"])
def test_both_files_move_diffusers_output_as_our_forward_does(
    trained: Trained, number: int
) -> None:
    pipe = PIPELINES[trained.kind].from_pretrained(
        trained.model, text_encoder=None, tokenizer=None, vae=None, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    channels = pipe.transformer.config.in_channels
    latent_BCThw = torch.randn(1, channels, 3, 6, 10, generator=generator)
    text_BSD, t_B = torch.randn(1, 512, 32, generator=generator), torch.tensor([700.0])
    inputs = (latent_BCThw, t_B, text_BSD)
    for expert in EXPERTS:
        folder = TRANSFORMER_OF[expert]
        transformer = getattr(pipe, folder)
        with torch.no_grad():
            base = transformer(*inputs, return_dict=False)[0]
            is_second = {"load_into_transformer_2": True} if expert == "low" else {}
            pipe.load_lora_weights(str(trained.file(expert, number)), **is_second)
            theirs = transformer(*inputs, return_dict=False)[0]
        model = load_transformer(trained.model, torch.device("cpu"), torch.float32, folder)
        adapters = lora.attach(model, list(lora.TARGETS), 2, 6.0, dropout=0.0, seed=0)
        start_from(adapters, trained.file(expert), expert)
        with torch.no_grad():
            ours = model(
                latent_BCThw,
                torch.tensor([[0.0, 700.0]]),
                torch.tensor([0]),
                text_BSD,
                choose_attention("math", torch.device("cpu"), torch.float32).attention,
            )
        assert (theirs - base).abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def options_for(trained: Trained, **changes: Any) -> Options:
    image = Image.fromarray(np.full((48, 80, 3), 90, np.uint8))
    options: dict[str, Any] = {
        "shape": WAN21.parse("80x48x9"),
        "num_steps": 6,
        "guidance": 2.0,
        "seed": 0,
        "negative_prompt": "",
        "image": image if trained.kind.startswith("i2v") else None,
        "shift": 5.0,
        "guidance_low": 1.5,
    }
    return Options(**(options | changes))


def test_the_pipeline_runs_with_both_loras_and_each_is_proven(
    trained: Trained, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if kind.name.lower().endswith(trained.kind))
    loras = files_by_transformer(kind, None, trained.file("high"), trained.file("low", 1))
    prompts, cpu = ["커다란 토끼가 풀밭에 서 있다."], ("cpu", torch.float32)
    compare(trained.model, loras, tmp_path / "out", prompts, options_for(trained), *cpu)
    report = json.loads((tmp_path / "out/samples.json").read_bytes())
    assert report["guidance"] == 2.0 and report["guidance_low"] == 1.5
    assert set(report["experts"]) == set(EXPERTS)
    for found in report["experts"].values():
        assert found["output_change"] > 0 and found["num_passes"] > 0
    # two passes a step, by guidance
    assert sum(found["num_passes"] for found in report["experts"].values()) == 12
    # one step is the high-noise expert's alone
    with pytest.raises(NotAppliedError, match="low-noise transformer did not run once"):
        few = options_for(trained, num_steps=1)
        compare(trained.model, loras, tmp_path / "few", prompts, few, *cpu)
    assert not (tmp_path / "few").exists()


def test_a_lora_of_the_other_expert_is_refused(trained: Trained) -> None:
    kind = KINDS[1]
    with pytest.raises(ValueError, match="of the low-noise expert by its metadata"):
        files_by_transformer(kind, None, trained.file("low"), None)
    with pytest.raises(ValueError, match="two transformers with a LoRA each"):
        files_by_transformer(kind, trained.file("low"), None, None)
    with pytest.raises(ValueError, match="one transformer: give its LoRA as --lora"):
        files_by_transformer(KINDS[0], None, trained.file("high"), None)
    model = load_transformer(trained.model, torch.device("cpu"), torch.float32)
    adapters = lora.attach(model, list(lora.TARGETS), 2, 6.0, dropout=0.0, seed=0)
    with pytest.raises(lora.LoRAError, match=r"of the low-noise expert, and model.expert"):
        start_from(adapters, trained.file("low"), "high")


def test_a_run_goes_on_and_not_with_the_other_expert(trained: Trained, dataset: Path) -> None:
    output = trained.outputs["high"]
    config = run_of(trained.model, dataset, "low", float(trained.kind.startswith("i2v")))
    config = msgspec.structs.replace(config, num_steps=4)
    with pytest.raises(ValueError, match=r"model.expert: 'high' then, 'low' now"):
        train_here(config, output)
