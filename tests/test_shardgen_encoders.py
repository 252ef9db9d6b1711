"""encoders.py: what a worker refuses to write with, each told with the key that mends it. What a
card answers is made up: the rules are the same without one.
"""

from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from shard_jobs import spec_for

from loader.shape import Bucket
from loader.vae.encoder import VAEError
from loader.vae.memory import EncodePlan
from shardgen.encode import encoders as module
from shardgen.encode.encoders import DeviceError, Encoders, check_memory

CARD = "a made-up card"
LARGE, IMAGE = Bucket(1280, 704, 49), Bucket(1280, 704, 1)


@pytest.fixture
def encoders(tiny_checkpoint: Path, tmp_path: Path) -> Encoders:
    return Encoders(spec_for(tiny_checkpoint, tmp_path, dtype="float16"))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of 24 GiB, and nobody may ask how much of that is free."""
    properties = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    # torch built for CUDA looks at the cards for it
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("free memory was asked"))
    return properties


def on_a_card(encoders: Encoders, **changes: float) -> Encoders:
    """The same ones, for plans alone."""
    encoders.device = torch.device("cuda")
    encoders.spec = msgspec.structs.replace(encoders.spec, **changes)
    return encoders


def test_batch_and_chunk_follow_from_shape_and_budget_on_every_card(
    encoders: Encoders, card: SimpleNamespace
) -> None:
    on_a_card(encoders, vae_memory_gib=4.0)
    plans = []
    for total_gib in (24, 140):
        card.total_memory = total_gib * 2**30
        plans.append([encoders.plan(bucket) for bucket in (LARGE, IMAGE, Bucket(832, 480, 9))])
    assert plans[0] == plans[1]
    assert plans[0][0].chunk_frames > 4 and plans[0][1].batch > 1 and plans[0][2].batch > 1


def test_on_a_cpu_the_recipes_own_batch_is_taken(encoders: Encoders) -> None:
    assert encoders.plan(LARGE) == encoders.plan(IMAGE) == EncodePlan(2, 16)


def test_a_budget_that_holds_no_window_is_refused_by_its_name(encoders: Encoders) -> None:
    on_a_card(encoders, vae_memory_gib=1.01)
    with pytest.raises(DeviceError, match=r"vae_memory_gib = 1\.01 is too little .* 1280x704x49"):
        encoders.plan(LARGE)


@pytest.mark.usefixtures("card")
def test_a_budget_above_the_cards_memory_is_refused_by_its_name() -> None:
    check_memory(24.0)
    with pytest.raises(DeviceError, match=rf"vae_memory_gib = 25, but {CARD} has 24\.0 GiB"):
        check_memory(25.0)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("deviation", [0.2, float("nan")])
def test_a_card_that_encodes_wrongly_is_refused(
    encoders: Encoders, monkeypatch: pytest.MonkeyPatch, deviation: float
) -> None:
    encoders._check_vae()
    monkeypatch.setattr(module, "deviation_from_float32", lambda vae, reference: deviation)
    with pytest.raises(DeviceError, match=f"{CARD} encodes wrongly in float16"):
        encoders._check_vae()


def test_a_window_that_overflows_is_refused_with_the_layer_and_the_key(encoders: Encoders) -> None:
    conv = encoders.vae.encoder.conv_in
    for parameter in conv.parameters():
        parameter.data *= 3e4
    windows = [np.random.default_rng(1).integers(0, 255, (5, 64, 64, 3), np.uint8)]
    told = r"overflows in float16: encoder\.down_blocks\.3 is .*set encode\.dtype = \"bfloat16\""
    with pytest.raises(VAEError, match=told):
        encoders.start_video(windows, 16)()
