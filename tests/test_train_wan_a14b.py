"""A14B and Wan2.1 against diffusers and PEFT, on the CPU in float32: both experts, text to video
and image to video, from a batch of the loader to the gradient of every adapter.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from wan_pairs import attach_both, check_gradients

from loader.models import I2V_A14B, T2V_A14B, TRANSFORMER_OF, WAN21_T2V, Expert, ModelKind
from loader.shape import Bucket
from tools.fake.step import random_batch
from train import flow
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.model.wan import Wan
from train.step import Inputs, prepare

CPU = torch.device("cpu")
# heads, and the width of the feed-forward over that of the model, as the real ones have them
A14B = {"num_attention_heads": 5, "attention_head_dim": 16, "ffn_dim": 216, "num_layers": 2}
WAN21_1_3B = {"num_attention_heads": 12, "attention_head_dim": 8, "ffn_dim": 560, "num_layers": 3}
SMALL = {"freq_dim": 32, "text_dim": 24}


class Case(NamedTuple):
    kind: ModelKind
    expert: Expert | None
    dims: dict[str, int]


CASES = {
    "t2v high": Case(T2V_A14B, "high", A14B),
    "t2v low": Case(T2V_A14B, "low", A14B),
    "i2v high": Case(I2V_A14B, "high", A14B),
    "i2v low": Case(I2V_A14B, "low", A14B),
    "wan2.1 1.3B": Case(WAN21_T2V, None, WAN21_1_3B),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def pair(case: Case, tmp_path: Path) -> tuple[Any, Wan]:
    """Both transformers are in the folder, with other weights; the case's own is loaded."""
    for seed, folder in enumerate(sorted(set(TRANSFORMER_OF.values()))):
        torch.manual_seed(seed)
        channels = {"in_channels": case.kind.in_channels, "out_channels": case.kind.out_channels}
        model = WanTransformer3DModel(patch_size=(1, 2, 2), **channels, **case.dims, **SMALL)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / folder)
    folder = TRANSFORMER_OF[case.expert]
    reference = WanTransformer3DModel.from_pretrained(tmp_path / folder)
    return reference, load_transformer(tmp_path, CPU, torch.float32, folder)


def inputs_of(case: Case) -> Inputs:
    """Two samples as a run prepares them. The text is long: the queries of cross-attention have a
    gradient worth comparing only where keys differ.
    """
    kind, is_i2v = case.kind, [bool(case.kind.condition)] * 2
    batch = random_batch(
        Bucket(64, 48, 9), CPU, is_i2v=is_i2v, text_dim=24, num_text_tokens=500, kind=kind
    )
    config = flow.FlowConfig(shift=kind.shift)
    return prepare(batch, flow.NoiseLaws(config, case.expert, kind.boundary or 0.0))


def ours(model: Wan, inputs: Inputs) -> Tensor:
    attention = choose_attention("math", CPU, torch.float32).attention
    out: Tensor = model(
        inputs.latent_BCThw, inputs.t_BR, inputs.num_clean_frames_B, inputs.text_BSD, attention
    )
    return out


def theirs(reference: Any, inputs: Inputs) -> Tensor:
    """A timestep per sample, as the pipelines of A14B pass it."""
    out: Tensor = reference(
        inputs.latent_BCThw, inputs.t_BR[:, 1], inputs.text_BSD.float(), return_dict=False
    )[0]
    return out


def test_forward_equals_diffusers(case: Case, pair: tuple[Any, Wan]) -> None:
    reference, model = pair
    inputs = inputs_of(case)
    assert inputs.latent_BCThw.shape[1] == case.kind.in_channels
    with torch.no_grad():
        torch.testing.assert_close(
            ours(model, inputs), theirs(reference, inputs), atol=1e-5, rtol=0
        )


def test_every_lora_gradient_equals_peft(case: Case, pair: tuple[Any, Wan]) -> None:
    reference, model = pair
    adapters, parameters = attach_both(reference, model)
    inputs = inputs_of(case)
    # over all latent frames: nothing is clean here
    (theirs(reference, inputs) - inputs.target_BCThw).square().mean().backward()
    losses_B = flow.sample_losses(
        ours(model, inputs), inputs.target_BCThw, inputs.num_clean_frames_B
    )
    losses_B.mean().backward()
    check_gradients(adapters, parameters)


def test_timesteps_are_of_the_experts_own_side(case: Case) -> None:
    t_B = inputs_of(case).t_BR[:, 1]
    if case.expert is None:
        return
    assert case.kind.boundary is not None
    is_high = t_B >= 1000 * case.kind.boundary
    assert is_high.tolist() == [case.expert == "high"] * 2
