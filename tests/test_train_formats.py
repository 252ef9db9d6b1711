"""`lora.init`: a LoRA of any format starts a run with the effect that it had, alpha other than the
rank, and what has no such effect is refused by name.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.lora import adapters as lora
from train.lora import files
from train.lora.adapters import LoRAError
from train.lora.formats import PEFT_CONFIG, PEFT_FILE, WAN_NAMES, read_lora
from train.lora.start import start_from
from train.model.load import load_transformer

# of the file, and of the run that starts from it
FILE_RANK, FILE_ALPHA = 4, 10.0
RANK, ALPHA = 8, 12.0
CPU = torch.device("cpu")


def attached(
    checkpoint: Path,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = lora.TARGETS,
    blocks: tuple[int, ...] | None = None,
) -> lora.LoRA:
    model = load_transformer(checkpoint, CPU, torch.float32)
    return lora.attach(model, targets, rank, alpha, dropout=0.0, seed=5, blocks=blocks)


def trained(checkpoint: Path, rank: int = FILE_RANK, alpha: float = FILE_ALPHA) -> lora.LoRA:
    """Adapters as a training leaves them: no factor is zero."""
    adapters = attached(checkpoint, rank, alpha)
    generator = torch.Generator().manual_seed(2)
    for a_RK, b_NR in adapters.tensors().values():
        a_RK.copy_(torch.randn(a_RK.shape, generator=generator))
        b_NR.copy_(torch.randn(b_NR.shape, generator=generator))
    return adapters


def updates(adapters: lora.LoRA) -> dict[str, Tensor]:
    scale = adapters.alpha / adapters.rank
    return {name: scale * (b_NR @ a_RK) for name, (a_RK, b_NR) in adapters.tensors().items()}


def save_kohya(adapters: lora.LoRA, path: Path) -> None:
    tensors = {}
    for name, (a_RK, b_NR) in adapters.tensors().items():
        _, block, target = name.split(".", 2)
        key = f"lora_unet_blocks_{block}_{WAN_NAMES[target].replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = a_RK.contiguous()
        tensors[f"{key}.lora_up.weight"] = b_NR.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(adapters.alpha)
    save_file(tensors, path)


def save_peft(adapters: lora.LoRA, path: Path) -> None:
    tensors = {}
    for name, (a_RK, b_NR) in adapters.tensors().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RK.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_NR.contiguous()
    save_file(tensors, path)
    config = {"r": adapters.rank, "lora_alpha": adapters.alpha, "alpha_pattern": None}
    path.with_name(PEFT_CONFIG).write_text(json.dumps(config))


def save_bare(adapters: lora.LoRA, path: Path) -> None:
    """Wan's names without a prefix and without alpha: the scale is in B."""
    tensors = {}
    for name, (a_RK, b_NR) in adapters.tensors().items():
        _, block, target = name.split(".", 2)
        key = f"blocks.{block}.{WAN_NAMES[target]}"
        tensors[f"{key}.lora_A.default.weight"] = a_RK.contiguous()
        tensors[f"{key}.lora_B.default.weight"] = b_NR * (adapters.alpha / adapters.rank)
    save_file(tensors, path)


FORMATS: dict[str, Callable[[lora.LoRA, Path], None]] = {
    "diffusers": files.save_diffusers,
    "comfyui": files.save_comfyui,
    "kohya": save_kohya,
    "peft": save_peft,
    "bare": save_bare,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rank", [RANK, FILE_RANK])
def test_every_format_starts_with_the_update_that_it_had(
    tiny_checkpoint: Path, tmp_path: Path, name: str, rank: int
) -> None:
    theirs = trained(tiny_checkpoint)
    FORMATS[name](theirs, tmp_path / "lora.safetensors")
    ours = attached(tiny_checkpoint, rank, ALPHA)
    said = start_from(ours, tmp_path / "lora.safetensors")
    assert "20 adapters of rank 4" in said and ("says no alpha" in said) is (name == "bare")
    before, after = updates(theirs), updates(ours)
    assert before.keys() == after.keys()
    for key, update in before.items():
        torch.testing.assert_close(after[key], update, rtol=1e-5, atol=1e-5)


def test_an_equal_rank_and_alpha_are_taken_bit_for_bit(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    theirs = trained(tiny_checkpoint)
    files.save_both(theirs, tmp_path)
    ours = attached(tiny_checkpoint, FILE_RANK, FILE_ALPHA)
    for file in (files.DIFFUSERS_FILE, files.COMFYUI_FILE):
        start_from(ours, tmp_path / file)
        for name, (a_RK, b_NR) in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name].a, a_RK)
            assert torch.equal(ours.tensors()[name].b, b_NR)


def test_a_lower_rank_gets_rows_as_they_were_drawn_that_add_nothing_yet(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    files.save_diffusers(trained(tiny_checkpoint), tmp_path / "lora.safetensors")
    fresh, ours = (attached(tiny_checkpoint, RANK, ALPHA) for _ in range(2))
    start_from(ours, tmp_path / "lora.safetensors")
    for name, (a_RK, b_NR) in ours.tensors().items():
        assert torch.equal(a_RK[FILE_RANK:], fresh.tensors()[name].a[FILE_RANK:])
        assert a_RK[FILE_RANK:].any() and not b_NR[:, FILE_RANK:].any()


def test_what_peft_itself_has_written_moves_the_model_as_in_peft(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """With the scale over the root of the rank, and another alpha for some layers."""
    config = LoraConfig(
        r=FILE_RANK,
        lora_alpha=10,
        target_modules=["to_q", "to_v"],
        use_rslora=True,
        alpha_pattern={"attn2.to_v": 3},
    )
    base = WanTransformer3DModel.from_pretrained(tiny_checkpoint / "transformer")
    peft: PeftModel = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(tmp_path)
    targets = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
    ours = attached(tiny_checkpoint, RANK, ALPHA, targets)
    start_from(ours, tmp_path)
    for name, update in updates(ours).items():
        layer = peft.base_model.model.get_submodule(name)
        theirs = layer.get_delta_weight("default")
        torch.testing.assert_close(update, theirs, rtol=1e-5, atol=1e-5)


def test_our_file_in_kohyas_keys_is_one_for_diffusers_too(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """So the test above reads what kohya's readers read, not a dialect of its own."""
    theirs = trained(tiny_checkpoint)
    save_kohya(theirs, tmp_path / "lora.safetensors")
    converted = _convert_musubi_wan_lora_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    for name, update in updates(theirs).items():
        b_NR, a_RK = (converted[f"transformer.{name}.lora_{kind}.weight"] for kind in "BA")
        torch.testing.assert_close(b_NR @ a_RK, update, rtol=1e-5, atol=1e-5)


def test_a_higher_rank_is_refused_with_the_figures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files.save_comfyui(trained(tiny_checkpoint), tmp_path / "lora.safetensors")
    message = r"blocks.0.attn1.to_k has rank 4, lora.rank = 2, .* set lora.rank = 4 or more"
    with pytest.raises(LoRAError, match=message):
        start_from(attached(tiny_checkpoint, 2, 2.0), tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", [4, 30], "is a layer of 30 to 32, here"),
        ("transformer.blocks.7.attn1.to_q.lora_A.weight", [4, 64], "in block 7, this model has"),
        ("transformer.blocks.0.attn1.to_q.lora_magnitude_vector", [64], "lora_magnitude_vector"),
        ("transformer.blocks.0.attn1.to_q.lora_B.bias", [64], r"lora_B\.bias"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", [4, 64], "k_img"),
        ("diffusion_model.blocks.0.self_attn.q.diff", [64, 64], r"self_attn\.q\.diff"),
        ("diffusion_model.head.head.lora_A.weight", [4, 64], r"head\.head"),
        # the second name of a factor that is there
        ("blocks.0.self_attn.q.lora_down.weight", [4, 64], r"1 of its 41 tensors"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", [4], r"A \[4\] and B \[32, 4\]"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, key: str, shape: list[int], message: str
) -> None:
    path = tmp_path / "lora.safetensors"
    files.save_diffusers(trained(tiny_checkpoint), path)
    tensors = load_file(path) | {key: torch.zeros(shape)}
    if "blocks.7" in key:
        tensors[key.replace("lora_A", "lora_B")] = torch.zeros(64, 4)
    save_file(tensors, path)
    ours = attached(tiny_checkpoint, RANK, ALPHA)
    before = updates(ours)
    with pytest.raises(LoRAError, match=message) as caught:
        start_from(ours, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[name], update) for name, update in updates(ours).items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("self_attn.q.alpha", torch.ones(2), r"an alpha of shape \[2\], which must be one number"),
        ("self_attn.q.alpha", torch.tensor(float("nan")), "attn1.to_q holds inf or NaN"),
        ("ffn.0.lora_A.weight", torch.full((4, 32), float("inf")), r"net\.0\.proj holds inf or"),
        # beyond float32
        (
            "ffn.0.lora_B.weight",
            torch.full((64, 4), 1e300, dtype=torch.float64),
            "holds inf or NaN",
        ),
    ],
)
def test_a_file_with_numbers_that_are_none_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, key: str, value: torch.Tensor, message: str
) -> None:
    path = tmp_path / "lora.safetensors"
    files.save_comfyui(trained(tiny_checkpoint), path)
    save_file(load_file(path) | {f"diffusion_model.blocks.0.{key}": value}, path)
    with pytest.raises(LoRAError, match=message):
        read_lora(path)


def test_a_lora_of_rank_0_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    files.save_comfyui(trained(tiny_checkpoint), path)
    empty = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{name}.weight": torch.zeros(shape)
        for name, shape in (("A", (0, 32)), ("B", (32, 0)))
    }
    save_file(load_file(path) | empty, path)
    with pytest.raises(LoRAError, match=r"has A \[0, 32\] and B \[32, 0\], which are no pair"):
        read_lora(path)


def test_other_layers_and_other_blocks_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files.save_diffusers(trained(tiny_checkpoint), tmp_path / "lora.safetensors")
    last = attached(tiny_checkpoint, RANK, ALPHA, blocks=(1,))
    with pytest.raises(LoRAError, match=r'blocks 0-1, lora\.blocks asks for 1; set .*"0-1"'):
        start_from(last, tmp_path / "lora.safetensors")
    few = attached(tiny_checkpoint, RANK, ALPHA, ("attn1.to_q",))
    message = r"0 missing, 18 not asked for, .*the file adapts \['attn1.to_k'"
    with pytest.raises(LoRAError, match=message):
        start_from(few, tmp_path / "lora.safetensors")


def test_a_file_that_can_not_be_used_says_why(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = tmp_path / PEFT_FILE
    save_peft(trained(tiny_checkpoint), whole)
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[:100])
    for path in (half, tmp_path / "nowhere.safetensors"):
        with pytest.raises(LoRAError, match=f"{path.name}: can't be read as a LoRA file"):
            read_lora(path)
    (tmp_path / PEFT_CONFIG).write_text('{"lora_alpha": 4, "use_dora": true}')
    with pytest.raises(LoRAError, match="is a DoRA"):
        read_lora(tmp_path)
    (tmp_path / PEFT_CONFIG).write_text('{"lora_alpha": "4"}')
    with pytest.raises(LoRAError, match=r"adapter_config\.json: Expected `float"):
        read_lora(tmp_path)
    (tmp_path / PEFT_CONFIG).write_text('{"lora_alpha": 4, "alpha_pattern": {"to_(q": 2}}')
    with pytest.raises(LoRAError, match=r"alpha_pattern 'to_\(q' is no regular expression"):
        read_lora(tmp_path)
    (tmp_path / PEFT_CONFIG).unlink()
    with pytest.raises(LoRAError, match=r"alpha stands in .*adapter_config\.json, and that can't"):
        read_lora(tmp_path)
    incomplete = load_file(whole)
    incomplete.pop("base_model.model.blocks.1.ffn.net.2.lora_B.weight")
    save_file(
        {key.removeprefix("base_model.model."): value for key, value in incomplete.items()},
        tmp_path / "incomplete.safetensors",
    )
    with pytest.raises(LoRAError, match=r"blocks.1.ffn.net.2 has no B \(up\)"):
        read_lora(tmp_path / "incomplete.safetensors")
