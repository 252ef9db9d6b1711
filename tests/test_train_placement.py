"""Weights that are not on the card: the same bits as resident ones, whatever is saved and in which
order passes come, and a slot that is overwritten or read too early is noticed.
"""

import gc
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from placed_runs import BUCKET, CPU, TINY, build, numbers, same, sample_of
from torch import Tensor
from trainer_runs import finish, start

from tools.fake.step import random_transformer
from train.activations.offload import CopyStream
from train.config import TrainConfig
from train.lora import adapters as lora
from train.lora.config import LoRAConfig
from train.lora.files import DIFFUSERS_FILE
from train.placement import streamed
from train.placement import weights as placement_weights
from train.placement.plan import card_bytes
from train.placement.ring import Ring, next_place
from train.placement.streamed import HostWeights
from train.run import Run


class LateCopies(CopyStream):
    """As if the second stream did nothing until somebody waits for it: then all up to that event,
    in order.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.queue: list[Callable[[], Any]] = []
        self.num_done = 0

    def run(self, work: Callable[[], Any]) -> Any:
        self.queue.append(work)
        return len(self.queue)

    def wait_for(self, event: Any) -> None:
        while self.num_done < event:
            self.queue[self.num_done]()
            self.num_done += 1


class Poisoned(Ring):
    """A slot holds NaN from when it is given up until what comes next has arrived."""

    def _fill(self, place: int) -> None:
        self.slots[self.slot_of(place)].fill_(float("nan"))
        super()._fill(place)


@pytest.fixture(params=["at once", "late"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as early as they may come, or as late."""
    monkeypatch.setattr(placement_weights, "Ring", Poisoned)
    if request.param == "late":
        monkeypatch.setattr(placement_weights, "CopyStream", LateCopies)


@cache
def resident(num_layers: int, options: str = "{}") -> list[Tensor]:
    """What resident weights give, once for all that are compared with it; options: as JSON."""
    wan = msgspec.structs.replace(TINY, num_layers=num_layers)
    return numbers(build("resident", wan=wan, **msgspec.json.decode(options)))


QKV = lora.TARGETS[:3]


@pytest.mark.parametrize(
    ("num_layers", "resident_blocks", "options"),
    [
        (5, 0, {}),
        (4, 0, {"activation_memory": "0.0002GiB", "targets": QKV}),
        (5, 2, {"activation_offload": True, "targets": QKV}),
        (5, 0, {"blocks": "2-4"}),
        (4, 0, {"blocks": "1,3"}),
        (3, 2, {}),
        (2, 0, {}),
    ],
)
@pytest.mark.usefixtures("copies")
def test_streamed_weights_give_the_bits_of_resident_ones(
    num_layers: int, resident_blocks: int, options: dict[str, Any]
) -> None:
    wan = msgspec.structs.replace(TINY, num_layers=num_layers)
    expected = resident(num_layers, msgspec.json.encode(options).decode())
    run = build("streamed", resident_blocks, wan=wan, **options)
    assert run.weights is not None
    assert len(run.weights.blocks) == num_layers - resident_blocks
    assert same(numbers(run), expected)


@pytest.mark.usefixtures("copies")
def test_weights_are_loaded_from_files_into_the_hosts_memory(tiny_checkpoint: Path) -> None:
    expected = numbers(build("resident", path=str(tiny_checkpoint)), text_dim=32)
    run = build("streamed", path=str(tiny_checkpoint))
    assert same(numbers(run, text_dim=32), expected)
    assert run.base_weights


class TooEarly(Ring):
    """Fills what comes next into the slot that is in use."""

    def slot_of(self, place: int) -> int:
        return 0

    def use(self, place: int, then: int | None) -> None:
        super().use(place, None)
        if then is not None:
            self._fill(then)


class NeverWaits(LateCopies):
    def wait_for(self, event: Any) -> None:
        # but what nobody has waited for is done in the end
        super().wait_for(event - 1)


def test_a_slot_that_is_overwritten_or_read_too_early_gives_other_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = resident(5)
    with monkeypatch.context() as patch:
        patch.setattr(placement_weights, "Ring", TooEarly)
        assert not same(numbers(build()), expected)
    with monkeypatch.context() as patch:
        patch.setattr(placement_weights, "CopyStream", NeverWaits)
        assert not same(numbers(build()), expected)


@pytest.mark.parametrize("trains", [False, True])
def test_a_weight_that_is_not_finite_is_named_wherever_it_is(trains: bool) -> None:
    run, name = build(resident_blocks=1), "blocks.4.attn2.q.weight"
    assert run.weights is not None and isinstance(run.weights._source, HostWeights)
    place, matrix = run.weights._matrices[name]
    matrix.view(run.weights._source._flat[place])[0, 0] = torch.nan
    sample = sample_of(run, 0)
    # at the end of a pass forward the first blocks' slots hold the last blocks' weights
    with torch.set_grad_enabled(trains):
        run.micro_step.forward(sample) if trains else run.micro_step.losses(sample)
    found = run.find_non_finite(sample)
    assert found == f"the weight {name} (float32) is not finite: check model.path"


def fills(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the places that are filled from now on."""
    assert run.weights is not None
    noted: list[int] = []
    ring, fill = run.weights.ring, run.weights.ring._fill

    def note(place: int) -> None:
        noted.append(place)
        fill(place)

    monkeypatch.setattr(ring, "_fill", note)
    return noted


def test_the_blocks_that_end_a_pass_are_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build()
    sample = sample_of(run, 0)
    noted = fills(run, monkeypatch)
    for expected in ([0, 1, 2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0]):
        noted.clear()
        run.micro_step.forward(sample)
        run.micro_step.backward()
        assert noted == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # forward, and where a backward pass follows
        ((0, None, 4, 0, True), 1),
        ((2, 1, 4, 0, True), 3),
        ((3, 2, 4, 0, True), None),
        # backward, down to the first block that is trained, and then forward again
        ((3, 3, 4, 0, True), 2),
        ((2, 3, 4, 0, True), 1),
        ((0, 1, 4, 0, True), 0),
        ((2, 3, 4, 2, True), 0),
        # without gradients one forward pass follows another
        ((3, 2, 4, 0, False), 0),
        ((0, 0, 4, 0, False), 1),
    ],
)
def test_what_is_needed_next(
    arguments: tuple[int, int | None, int, int, bool], expected: int | None
) -> None:
    assert next_place(*arguments) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_memory": "all"}, 'activation_memory = "all" would need the weights of all'),
        ({"lora": LoRAConfig(rank=4, base="nf4")}, 'lora.base = "nf4" keeps the weights on'),
        ({"placement": "resident", "resident_blocks": 1}, "model.resident_blocks = 1: is for"),
        ({"resident_blocks": 5}, "model.resident_blocks = 5: the model has 5 blocks"),
    ],
)
def test_what_can_not_go_together_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_the_run_says_where_the_weights_are() -> None:
    (line,) = [line for line in build(resident_blocks=1).describe() if "weights of" in line]
    assert "weights of 4 blocks wait in the host's memory" in line
    assert "CUDA graphs are off" in line


def test_the_memory_goes_with_the_run() -> None:
    run = build()
    assert run.weights is not None
    held = [weakref.ref(each) for each in (run.weights, run.weights._source, run.model)]
    assert all(each() is not None for each in held)
    del run
    gc.collect()
    assert all(each() is None for each in held)


def test_ranks_of_a_host_share_one_copy_and_train_the_same_bits(
    run_config: TrainConfig, two_ranks: Path, tmp_path: Path
) -> None:
    model = msgspec.structs.replace(run_config.model, placement="streamed")
    said = finish(start(run_config, tmp_path, 2, model=model))
    assert "once per host" in said
    ours, theirs = ((folder / DIFFUSERS_FILE).read_bytes() for folder in (tmp_path, two_ranks))
    assert ours == theirs


def test_a_host_without_the_memory_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "available_bytes", lambda: 4096)
    with pytest.raises(
        ValueError, match=r"for streamed weights: is more than the 0\.0 GiB of this"
    ):
        build(path=str(tiny_checkpoint))


@pytest.mark.parametrize("activation_memory", ["block", "auto"])
def test_auto_keeps_as_many_blocks_as_fit_beside_the_activations(activation_memory: str) -> None:
    wan = msgspec.structs.replace(TINY, num_layers=9)
    card = card_bytes(wan, 9, lora.TARGETS, 4, torch.float32)
    held_bytes = sum(
        each.nbytes for each in random_transformer(wan, CPU, torch.float32).parameters()
    )

    def moved(room_bytes: float) -> Run:
        """On a card with so much room for everything; the model that is given has its place."""
        return build(
            "auto",
            wan=wan,
            activation_memory=activation_memory,
            free_bytes=lambda _: room_bytes - held_bytes,
        )

    everything = moved(2.0**40)
    assert everything.weights is None
    # what is saved does not change with the place of the weights
    needed = everything.plans[BUCKET].num_bytes + card.others + 9 * card.block
    assert moved(needed).weights is None
    if activation_memory == "block":
        for missing_bytes, num_moved in ((1, 3), (4 * card.block + 1, 7)):
            run = moved(needed - missing_bytes)
            assert run.weights is not None and len(run.weights.blocks) == num_moved
    run = moved(card.others)
    assert run.weights is not None and len(run.weights.blocks) == 9
