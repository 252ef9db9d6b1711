"""The lean transformer against diffusers and PEFT, on the CPU in float32: T2V and I2V in one
batch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from wan_pairs import attach_both, check_gradients

from train import flow, optim
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.model.wan import Wan, WanConfig
from train.step import Inputs as StepInputs
from train.step import MicroStep

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "ffn_dim": 64,
    "freq_dim": 64,
}
WIDER = {
    "num_layers": 3,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "ffn_dim": 160,
    "freq_dim": 32,
}


class Inputs(NamedTuple):
    noised: flow.Noised
    text_BSD: Tensor
    t_BL: Tensor  # what diffusers takes instead of two rows: a timestep per token


@pytest.fixture(scope="module", params=[TINY, WIDER], ids=["tiny", "wider"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a transformer whose norms and tables are not the identity."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=48, out_channels=48, text_dim=32, **request.param
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path / "transformer")
    return path


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[Any, Wan]]:
    yield (
        WanTransformer3DModel.from_pretrained(folder / "transformer"),
        load_transformer(folder, torch.device("cpu"), torch.float32),
    )


def make_inputs(seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(2, 48, 3, 6, 8, generator=generator)
    noise = flow.sample_noise([11 + seed, 12 + seed], latent.shape[1:], latent.device)
    noised = flow.noise_latent(latent, noise, [0.7, 0.35], is_i2v=[False, True])
    t_BL = noised.t_BR[:, 1:].repeat(1, 3 * 3 * 4)
    t_BL[1, :12] = 0
    return Inputs(noised, 0.5 * torch.randn(2, 512, 32, generator=generator), t_BL)


def ours_forward(model: Wan, inputs: Inputs) -> Tensor:
    noised, text_BSD, _ = inputs
    out: Tensor = model(
        noised.latent_BCThw,
        noised.t_BR,
        noised.num_clean_frames_B,
        text_BSD,
        choose_attention("math", torch.device("cpu"), torch.float32).attention,
    )
    return out


def loss_of(velocity: Tensor, inputs: Inputs) -> Tensor:
    return flow.sample_losses(
        velocity, inputs.noised.target_BCThw, inputs.noised.num_clean_frames_B
    ).mean()


def test_forward_equals_diffusers(pair: tuple[Any, Wan]) -> None:
    reference, model = pair
    inputs = make_inputs()
    with torch.no_grad():
        theirs = reference(
            inputs.noised.latent_BCThw, inputs.t_BL, inputs.text_BSD, return_dict=False
        )[0]
        torch.testing.assert_close(ours_forward(model, inputs), theirs, atol=1e-5, rtol=0)


def test_every_lora_gradient_equals_peft(pair: tuple[Any, Wan]) -> None:
    reference, model = pair
    adapters, theirs = attach_both(reference, model)
    inputs = make_inputs()
    loss_of(
        reference(inputs.noised.latent_BCThw, inputs.t_BL, inputs.text_BSD, return_dict=False)[0],
        inputs,
    ).backward()
    loss_of(ours_forward(model, inputs), inputs).backward()
    check_gradients(adapters, theirs)


def test_loss_after_five_adamw_steps_equals_peft(pair: tuple[Any, Wan]) -> None:
    reference, model = pair
    adapters, theirs = attach_both(reference, model)
    flat = optim.flatten(adapters.parameters())
    ours_optimizer = optim.make_optimizer(
        flat.groups, optim.OptimConfig(lr=1e-2, beta2=0.99, weight_decay=0.05)
    )
    their_optimizer = torch.optim.AdamW(
        theirs.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05
    )
    for step in range(5):
        inputs = make_inputs(step)
        flat.buffer.zero_()
        loss_of(ours_forward(model, inputs), inputs).backward()
        optim.clip_gradient(flat.gradient, 1.0)
        ours_optimizer.step()
        adapters.refresh()
        their_optimizer.zero_grad()
        loss_of(
            reference(inputs.noised.latent_BCThw, inputs.t_BL, inputs.text_BSD, return_dict=False)[
                0
            ],
            inputs,
        ).backward()
        nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        their_optimizer.step()
    inputs = make_inputs(9)
    with torch.no_grad():
        ours = loss_of(ours_forward(model, inputs), inputs)
        expected = loss_of(
            reference(inputs.noised.latent_BCThw, inputs.t_BL, inputs.text_BSD, return_dict=False)[
                0
            ],
            inputs,
        )
        untrained = loss_of(ours_forward(load_fresh(reference.config), inputs), inputs)
    assert abs(ours - expected) / expected < 1e-4
    assert abs(untrained - expected) / expected > 1e-3  # the steps changed something


def load_fresh(config: Any) -> Wan:
    torch.manual_seed(3)
    model = Wan(msgspec.convert(dict(config), WanConfig, strict=False))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_attention_that_cannot_run_here_is_refused_before_the_first_step(name: Any) -> None:
    with pytest.raises(
        ValueError, match=f'"{name}" can\'t run in torch.float32 on this cpu .*set "auto"'
    ):
        choose_attention(name, torch.device("cpu"), torch.float32)


def test_text_of_another_width_than_the_model_takes_is_named(folder: Path) -> None:
    model = load_transformer(folder, torch.device("cpu"), torch.float32)
    step = MicroStep(
        model,
        lambda seeds_B, first_token: None,
        choose_attention("auto", torch.device("cpu"), torch.float32).attention,
        None,
        torch.amp.GradScaler("cpu", enabled=False),
        global_batch=1,
        max_graph_tokens=0,
    )
    latent, text = torch.zeros(1, 48, 1, 4, 4), torch.zeros(1, 512, model.config.text_dim + 8)
    with pytest.raises(
        ValueError, match=f"{text.shape[2]} wide, the model's text_dim is {model.config.text_dim}"
    ):
        step.forward(
            StepInputs(
                latent,
                torch.zeros(1, 2),
                torch.zeros(1),
                text,
                latent,
                torch.zeros(1),
                torch.ones(1),
            )
        )
