"""An evaluation from prompts to result.json, on a model with random weights and no network."""

import shutil
from collections.abc import Callable
from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loader.config import dump_toml, load_toml
from loader.feed_config import FeedConfig
from loader.shape import WAN21
from loader.walk import Walk
from tools.applied import NotAppliedError
from tools.evaluate.__main__ import config_of_run
from tools.evaluate.clips import read_mp4, read_reference
from tools.evaluate.compare import compare
from tools.evaluate.config import EvaluateConfig, SamplingConfig, SetConfig, check
from tools.evaluate.evaluation_set import EvaluationSet, choose_set, read_set
from tools.evaluate.generate import generate
from tools.evaluate.result import Result, read_result, write_result
from tools.evaluate.score import score
from tools.fake.batch import write_synthetic_dataset
from train.config import TrainConfig
from train.flow import FlowConfig
from train.lora import adapters as lora
from train.lora.files import save_comfyui, save_diffusers
from train.model.config import ModelConfig
from train.model.load import load_transformer
from train.parallel.mesh import World

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LoRA files: lora, comfyui, and one with next to no effect."""
    folder = tmp_path_factory.mktemp("files")
    model = load_transformer(tiny_checkpoint, WORLD.device, torch.float32)
    adapters = lora.attach(model, list(lora.TARGETS), 4, 6.0, 0.0, 0)
    for _, b in adapters.tensors().values():
        b.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    adapters.refresh()
    save_diffusers(adapters, folder / "lora.safetensors")
    save_comfyui(adapters, folder / "comfyui.safetensors")
    for _, b in adapters.tensors().values():
        b.mul_(1e-9)
    save_diffusers(adapters, folder / "weak.safetensors")
    return folder


@pytest.fixture(scope="module")
def config(
    tiny_checkpoint: Path, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> EvaluateConfig:
    """Two prompts, two seeds, one prompt decoded; generated."""
    dataset = tmp_path_factory.mktemp("synthetic")
    write_synthetic_dataset(dataset, {"96x64x9": 6, "64x64x1": 2}, split="val")
    config = EvaluateConfig(
        output=str(tmp_path_factory.mktemp("evaluation") / "evaluations" / "first"),
        model=str(tiny_checkpoint),
        datasets=[str(dataset)],
        candidates={"lora": str(files / "lora.safetensors")},
        set=SetConfig(num_prompts=2, num_seeds=2, num_decoded=1),
        sampling=SamplingConfig(num_steps=2, guidance=2.0, dtype="float32"),
    )
    generate(config, WORLD)
    return config


@pytest.fixture(scope="module")
def result(config: EvaluateConfig) -> Result:
    chosen = read_set(config.folder)
    assert chosen is not None
    score(config, chosen, WORLD.device)
    return compare(config, chosen)


def test_every_clip_is_there_and_names_stay_inside_the_folder(
    config: EvaluateConfig, result: Result
) -> None:
    assert [each.name for each in result.variants] == ["real", "base", "lora"]
    assert len(result.clips) == 1 + 2 + 2
    for clip in result.clips:
        assert read_mp4((config.folder / clip.file).read_bytes(), clip.file).shape[0] == 9
    assert all((config.folder / name).stat().st_size for name in result.pictures)
    # another test may have compared once more
    found = read_result(config.folder)
    assert found == msgspec.structs.replace(result, time=found.time)
    for name in ("/etc/passwd", "../x.png"):
        with pytest.raises(ValueError, match="inside its folder"):
            write_result(config.folder, msgspec.structs.replace(result, pictures=[name]))


def test_clips_run_at_the_models_own_frame_rate(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    write_synthetic_dataset(tmp_path / "data", {"64x64x5": 1}, split="val", layout=WAN21)
    config = EvaluateConfig(
        output=str(tmp_path / "evaluation"),
        model=str(tiny_model("wan2.1-t2v")),
        datasets=[str(tmp_path / "data")],
        set=SetConfig(num_prompts=1, num_seeds=1, num_decoded=1),
        sampling=SamplingConfig(num_steps=1, guidance=1.0, dtype="float32"),
    )
    generate(config, WORLD)
    for variant in ("real", "base"):
        (path,) = (config.folder / variant).glob("*.mp4")
        with av.open(path) as clip:
            assert clip.streams.video[0].average_rate == 16


def test_all_variants_have_the_same_noise_and_the_lora_is_in_effect(config: EvaluateConfig) -> None:
    names = sorted(path.name for path in (config.folder / "base").glob("*.npy"))
    assert names == sorted(path.name for path in (config.folder / "lora").glob("*.npy"))
    base, tuned = (np.load(config.folder / each / names[0]) for each in ("base", "lora"))
    assert np.isfinite(base).all() and not np.array_equal(base, tuned)
    variant = msgspec.json.decode((config.folder / "lora/variant.json").read_bytes())
    assert variant["difference_levels"] > 0 and variant["lora"] == "lora.safetensors"


def test_what_was_not_measured_says_why(result: Result) -> None:
    missing = {m.name: m.why for m in result.metrics if m.variant == "lora" and m.why}
    assert missing["fvd"] == "fvd.weights is empty"
    assert missing["clip_cosine"] == "clip.model is empty"
    assert "too few prompts" in missing["motion"]
    assert {c.verdict for c in result.comparisons if not c.category} == {"too_few"}
    assert result.grade == "lora: not measured"


def test_the_vae_is_measured_against_the_shards_pictures(result: Result) -> None:
    (psnr,) = (m for m in result.metrics if m.name == "psnr" and not m.category)
    assert psnr.variant == "real" and isinstance(psnr.value, float) and 0 < psnr.value < 60
    assert "KEY.jpg" in psnr.model


def test_nothing_is_made_twice_and_a_lost_clip_is_made_again(config: EvaluateConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.folder.rglob("*.npy")}
    (lost, *others) = (path for path in before if path.parent.name == "lora")
    bytes_before = lost.read_bytes()
    lost.unlink()
    generate(config, WORLD)
    assert lost.read_bytes() == bytes_before
    assert all(path.stat().st_mtime_ns == before[path] for path in others)
    scores = config.folder / "scores/lora.json"
    if scores.exists():
        chosen, time_ns = read_set(config.folder), scores.stat().st_mtime_ns
        assert chosen is not None
        score(config, chosen, WORLD.device)
        assert scores.stat().st_mtime_ns == time_ns


def test_a_lora_that_is_not_in_effect_is_refused_by_name(
    config: EvaluateConfig, files: Path
) -> None:
    weak = msgspec.structs.replace(config, candidates={"weak": str(files / "weak.safetensors")})
    with pytest.raises(NotAppliedError, match="has no effect"):
        generate(weak, WORLD)
    assert not list((config.folder / "weak").glob("*.npy"))


def test_a_lora_in_other_keys_makes_the_same_clips(config: EvaluateConfig, files: Path) -> None:
    path = files / "comfyui.safetensors"
    generate(msgspec.structs.replace(config, candidates={"comfyui": str(path)}), WORLD)
    for file in (config.folder / "lora").glob("*.npy"):
        same = np.load(config.folder / "comfyui" / file.name)
        assert np.allclose(np.load(file), same, atol=2e-2)


def test_a_lora_of_other_layers_is_refused(
    config: EvaluateConfig, files: Path, tmp_path: Path
) -> None:
    tensors = load_file(files / "lora.safetensors")
    with safe_open(files / "lora.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    dropped = dict(list(tensors.items())[:-2])
    save_file(dropped, tmp_path / "part.safetensors", metadata)
    other = msgspec.structs.replace(config, candidates={"part": str(tmp_path / "part.safetensors")})
    with pytest.raises(ValueError, match="adapters differ"):
        generate(other, WORLD)
    # told before any clip is made
    empty = msgspec.structs.replace(other, output=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="adapters differ"):
        generate(empty, WORLD)
    assert not empty.folder.exists()


def test_what_does_not_go_together_is_refused_before_any_clip_is_made(
    config: EvaluateConfig, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    other = msgspec.structs.replace(
        config, model=str(tiny_model("wan2.1-t2v")), output=str(tmp_path / "empty")
    )
    with pytest.raises(ValueError, match="its latents have 48 channels"):
        generate(other, WORLD)
    assert not other.folder.exists()


def test_clips_of_another_base_are_not_mixed_with_those_that_are_there(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1.0
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="its clips are of another base model than"):
        generate(msgspec.structs.replace(config, model=str(model)), WORLD)


def test_scores_of_clips_that_were_made_again_are_not_compared(
    config: EvaluateConfig, result: Result
) -> None:
    chosen = read_set(config.folder)
    assert chosen is not None
    assert compare(config, chosen).metrics == result.metrics
    path = min((config.folder / "lora").glob("*.mp4"))
    data = path.read_bytes()
    path.write_bytes(data + b"again")
    with pytest.raises(ValueError, match=r"lora\.json: its clips were made again since"):
        compare(config, chosen)
    path.write_bytes(data)


def test_a_shape_has_its_own_shift_and_without_one_the_hash_stays(config: EvaluateConfig) -> None:
    def chosen_with(shifts: dict[str, float]) -> EvaluationSet:
        sampling = msgspec.structs.replace(config.sampling, shifts=shifts)
        with Walk(FeedConfig(datasets=config.datasets), "val", WORLD.device) as walk:
            return choose_set(walk, msgspec.structs.replace(config, sampling=sampling))

    plain = chosen_with({})
    fields = msgspec.to_builtins(plain)
    assert fields.pop("shifts") == {} and fields.pop("hash") == plain.hash
    encoded = msgspec.json.encode(fields | {"hash": ""})
    assert xxhash.xxh3_128_hexdigest(encoded) == plain.hash
    assert plain.shift_of(plain.prompts[0]) == 5.0
    assert chosen_with({"64x64x9": 3.0}) == plain
    own = chosen_with({"96x64x9": 3.0})
    assert own.hash != plain.hash and own.shift_of(own.prompts[0]) == 3.0


def test_the_real_windows_of_a_category_are_those_whose_label_says_so(
    config: EvaluateConfig,
) -> None:
    features_ND, categories = read_reference(config.folder)
    assert len(features_ND) == len(categories) == 6 and set(categories) == {"synthetic"}


def test_final_takes_what_the_run_was_trained_with_and_writes_what_it_does(
    config: EvaluateConfig, files: Path, tmp_path: Path
) -> None:
    trained = TrainConfig(
        output=str(tmp_path),
        model=ModelConfig(path=config.model, dtype="float32"),
        data=FeedConfig(datasets=config.datasets),
        flow=FlowConfig(shift=4.0, shifts={"96x64x9": 3.0}),
        num_steps=1,
        global_batch=1,
    )
    (tmp_path / "config.toml").write_text(dump_toml(trained))
    (tmp_path / "best").mkdir()
    shutil.copy(files / "lora.safetensors", tmp_path / "best" / "lora.safetensors")
    found = config_of_run(tmp_path, ["set.num_prompts=3"])
    assert found.sampling.shift == 4.0 and found.sampling.shifts == {"96x64x9": 3.0}
    assert found.set.num_prompts == 3
    # `score` and `compare` of that file are of the same evaluation
    assert load_toml(found.folder / "config.toml", EvaluateConfig) == found
    with pytest.raises(ValueError, match=r"final .* \(with --set set\.prompts=3\): .*did you mean"):
        config_of_run(tmp_path, ["set.prompts=3"])


def test_another_set_or_another_lora_does_not_mix_with_the_clips_that_are_there(
    config: EvaluateConfig, files: Path
) -> None:
    more = msgspec.structs.replace(config, set=SetConfig(num_prompts=1))
    with pytest.raises(ValueError, match="another evaluation set"):
        generate(more, WORLD)
    other = msgspec.structs.replace(config, candidates={"lora": str(files / "weak.safetensors")})
    with pytest.raises(ValueError, match="of another LoRA"):
        generate(other, WORLD)


def test_a_set_may_be_of_some_categories_alone(config: EvaluateConfig) -> None:
    def chosen_of(*categories: str) -> EvaluationSet:
        wanted = msgspec.structs.replace(config.set, categories=list(categories))
        with Walk(FeedConfig(datasets=config.datasets), "val", WORLD.device) as walk:
            return choose_set(walk, msgspec.structs.replace(config, set=wanted))

    assert chosen_of("synthetic") == read_set(config.folder)
    # beside one that is there, too
    with pytest.raises(ValueError, match="no videos of sports; it has some of synthetic"):
        chosen_of("synthetic", "sports")


def test_names_and_hashes_are_checked_before_any_time_is_spent(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"candidates\.base"):
        check(msgspec.structs.replace(config, candidates={"base": "x"}))
    fvd = msgspec.structs.replace(config.fvd, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"its own fvd\.name"):
        check(msgspec.structs.replace(config, fvd=fvd))
    # one of the two is enough to train on
    (tmp_path / "low" / "transformer_2").mkdir(parents=True)
    (tmp_path / "high" / "transformer").mkdir(parents=True)
    (tmp_path / "high" / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    for expert in ("high", "low"):
        with pytest.raises(ValueError, match="two experts"):
            check(msgspec.structs.replace(config, model=str(tmp_path / expert)))
