"""What is kept is a matter of bytes and time only: the gradients are the same bit for bit."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loader.shape import Bucket
from train.activations import plan as remat
from train.activations.offload import HostInputs
from train.lora import adapters as lora
from train.model.attention import choose_attention
from train.model.load import load_transformer
from train.model.wan import TI2V_5B, Wan

CPU = torch.device("cpu")
TOKENS, TEXT_TOKENS = 2 * 3 * 4, 512
SHAPE = remat.Shape(2, TOKENS, TEXT_TOKENS)


class Count(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func] += 1
        return func(*args, **(kwargs or {}))


def gradients(
    checkpoint: Path,
    budget_bytes: float,
    offload: bool = False,
    targets: tuple[str, ...] = lora.TARGETS,
) -> tuple[list[Tensor], Counter[Any], Wan]:
    model = load_transformer(checkpoint, CPU, torch.float32)
    adapters = lora.attach(model, targets, 8, 20.0, dropout=0.1, seed=1)
    adapters.set_seeds(torch.tensor([7, 8]))
    for _, b in adapters.tensors().values():
        b.normal_(generator=torch.Generator().manual_seed(0))
    adapters.refresh()
    generator = torch.Generator().manual_seed(3)
    latent, text = (
        torch.randn(2, *shape, generator=generator) for shape in ((48, 2, 6, 8), (TEXT_TOKENS, 32))
    )
    _, attention = choose_attention("auto", CPU, torch.float32)
    plans = remat.plan_run(model.config, [SHAPE], targets, 4, budget_bytes, 0.0, 0, offload=offload)
    with Count() as count:
        velocity = model(
            latent,
            torch.tensor([[0.0, 700.0]] * 2),
            torch.tensor([0, 1]),
            text,
            attention,
            remat.block_runner(model, plans),
        )
        velocity.square().mean().backward()
    return [p.grad for p in adapters.parameters() if p.grad is not None], count.operations, model


def test_every_budget_gives_the_same_bits_and_a_larger_one_computes_less_again(
    tiny_checkpoint: Path,
) -> None:
    expected, operations, model = gradients(tiny_checkpoint, float("inf"))
    sizes = remat.output_bytes(model.config, TOKENS, TEXT_TOKENS, 4)
    everything = 2 * 2 * sum(sizes.values())  # two samples, two blocks
    budgets = [0, 2 * sizes["attn1"], 4 * sizes["attn1"], everything // 2, everything]
    num_gemms, num_attentions = [], []
    for budget_bytes in budgets:
        found, operations, _ = gradients(tiny_checkpoint, budget_bytes)
        for ours, twin in zip(found, expected, strict=True):
            assert torch.equal(ours, twin)
        num_gemms.append(operations[torch.ops.aten.addmm.default])
        num_attentions.append(sum(operations[op] for op in remat._ATTENTION))
    # two blocks, self and cross, once or twice
    assert num_attentions[:3] == [8, 7, 6] and num_attentions[4] == 4
    assert num_gemms[0] == num_gemms[2] > num_gemms[3] > num_gemms[4]


@pytest.mark.parametrize(("targets", "num_parked"), [(lora.TARGETS, 1), (lora.TARGETS[:3], 2)])
def test_inputs_that_wait_in_the_hosts_memory_give_the_same_bits(
    targets: tuple[str, ...],
    num_parked: int,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Block 1's stay; block 0's, from which what was left before it is missing, are on their way
    before they are asked for. What the block before left is parked too, unless an adapted
    ffn.down keeps it as its output.
    """
    moved, back, park = [], HostInputs._back, HostInputs._park
    last: list[int] = []

    def counted(self: HostInputs, parked: Any) -> Tensor:
        tensor = back(self, parked)
        moved.append(
            (
                parked.block,
                parked.stays is None,
                [before.coming is not None for before in self._parked.get(parked.block - 1, ())],
            )
        )
        return tensor

    def numbered(self: HostInputs, block: int, number: int, tensor: Tensor) -> Any:
        last.append(number)
        return park(self, block, number, tensor)

    monkeypatch.setattr(HostInputs, "_back", counted)
    monkeypatch.setattr(HostInputs, "_park", numbered)
    for budget_bytes in (0.0, 1e5):
        expected, operations, _ = gradients(tiny_checkpoint, budget_bytes, targets=targets)
        found, with_offload, _ = gradients(
            tiny_checkpoint, budget_bytes, offload=True, targets=targets
        )
        assert all(map(torch.equal, found, expected))
        assert (
            with_offload[torch.ops.aten.addmm.default] == operations[torch.ops.aten.addmm.default]
        )
    assert moved == 2 * [*[(1, False, [True])] * num_parked, (0, True, [])]
    assert last == 2 * [0, *range(num_parked)]


@pytest.mark.parametrize("budget_gib", [0.5, 2.0, 8.0, 17.0])
def test_the_plan_fills_the_budget_and_never_exceeds_it(budget_gib: float) -> None:
    sizes = remat.output_bytes(TI2V_5B, 11_440, 512, 2)
    kept = remat.choose_kept(sizes, 30, budget_gib * 2**30)
    used = sum(sizes[name] for block in kept for name in block)
    assert used <= budget_gib * 2**30
    assert used > 0.9 * budget_gib * 2**30
    assert all("attn1" in block for block in kept) or not any(
        block - {"attn1"} for block in kept[-1:]
    )


def test_cross_attention_is_kept_before_the_gemms_where_attention_is_slow() -> None:
    sizes = remat.output_bytes(TI2V_5B, 11_440, 512, 2)
    for cross_first in (False, True):
        # self-attention takes 2.0 of them
        kept = remat.choose_kept(sizes, 30, 3.0 * 2**30, cross_first)
        assert all("attn1" in block for block in kept)
        assert (
            any("attn2" in block for block in kept)
            == cross_first
            == (not any("attn1.out" in b for b in kept))
        )


def test_a_wrong_budget_is_named() -> None:
    assert remat.parse_activation_memory("6.5GiB") == 6.5 * 2**30
    with pytest.raises(
        ValueError, match=r'activation_memory = "6GB": use "auto", "all", "block" or'
    ):
        remat.parse_activation_memory("6GB")


def test_what_waits_in_the_hosts_memory_comes_back_whoever_has_its_place_since() -> None:
    """Four blocks, two shapes in turn; nobody overwrites what has not left yet, and block 3's
    stay.
    """
    host = HostInputs(4, [4 * 30, 2 * 30], CPU)
    for num_tokens in (5, 10, 5):
        packed = []
        for block in range(4):
            inputs = [torch.randn(num_tokens, 3), torch.randn(num_tokens, 3).half()][
                : 1 if block == 0 else 2
            ]
            pack, unpack = host.hooks(block, inputs)
            expected, other = [tensor.clone() for tensor in inputs], torch.randn(2)
            packed.append((unpack, [pack(tensor) for tensor in inputs], expected))
            assert pack(other) is other
            if block < 3:
                for tensor in inputs:
                    tensor.fill_(float("nan"))
        for unpack, parked, expected in reversed(packed):
            assert all(map(torch.equal, map(unpack, parked), expected))
    with pytest.raises(AssertionError, match="the next forward pass has overwritten"):
        host.hooks(0, [])
        unpack(parked[0])


class LateCopies(HostInputs):
    """As if the second stream did nothing until somebody waits for it: then all up to that event,
    in order.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.num_done = 0

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        # the memory, whoever has it by then
        self.queue.append((to.data.view(-1), source.data.view(-1)))
        return len(self.queue)

    def _wait_for(self, event: Any) -> None:
        while event is not None and self.num_done < event:
            to, source = self.queue[self.num_done]
            to.copy_(source)
            self.num_done += 1


def test_no_memory_is_let_go_of_before_its_copy_was_waited_for() -> None:
    host = LateCopies(6, [4 * 30, 2 * 30], CPU)
    for _ in range(3):
        packed, lent = [], []
        for block in range(6):
            inputs = [torch.randn(10, 3), torch.randn(10, 3).half()]
            if block < 5:  # block 5's stay
                # .data does not hold it
                lent += [(weakref.ref(tensor), tensor.data.view(-1)) for tensor in inputs]
            expected = [tensor.clone() for tensor in inputs]
            pack, unpack = host.hooks(block, inputs)
            packed.append((unpack, [pack(tensor) for tensor in inputs], expected))
            del inputs
            free = [memory for holder, memory in lent if holder() is None]
            for memory in free:
                memory.fill_(float("nan"))  # somebody else has it now
            assert len(free) == 2 * max(min(block, 4) - 1, 0)
        while packed:
            unpack, parked, expected = packed.pop()
            assert all(map(torch.equal, map(unpack, parked), expected))


def test_memory_that_cannot_be_pinned_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(
        ValueError, match=r"activation_offload: 5\.0 GiB .* can't be pinned .*set it to false"
    ):
        HostInputs(6, [2**30], CPU)


def test_pinned_memory_is_counted_as_torch_takes_it() -> None:
    """9.05 and 4.53 GiB at 121 frames, each as the next power of two."""
    kept = remat.plan_shape(
        TI2V_5B, remat.Shape(1, 27_280, 512), lora.TARGETS[:3], 2, 0.0, offload=True
    )
    assert kept.host_bytes == (16 + 8) * 2**30
    assert (
        remat.plan_shape(TI2V_5B, remat.Shape(1, 27_280, 512), lora.TARGETS[:3], 2, 0.0).host_bytes
        == 0
    )


def test_offloaded_inputs_leave_room_to_keep_more() -> None:
    shape, num_bytes = remat.Shape(1, 11_440, 512), 20.0 * 2**30
    plans = [
        remat.plan_shape(TI2V_5B, shape, lora.TARGETS[:3], 2, None, num_bytes, "efficient", offload)
        for offload in (False, True)
    ]
    assert all(0.95 * num_bytes < plan.num_bytes <= num_bytes for plan in plans)
    without, with_offload = (sum(len(block) for block in plan.blocks or []) for plan in plans)
    assert with_offload > without + 10
    large = remat.plan_shape(
        TI2V_5B, shape, lora.TARGETS[:3], 2, None, 100.0 * 2**30, "efficient", True
    )
    assert large.blocks is None and large.host_bytes == 0  # where all fits, nothing has to move


@pytest.mark.parametrize("room_gib", [13.0, 20.0, 30.0, 100.0])
def test_auto_fills_the_room_and_keeps_everything_where_it_fits(room_gib: float) -> None:
    large, small = remat.Shape(1, 11_440, 512), remat.Shape(1, 1_170, 512)
    room_bytes = room_gib * 2**30
    for shapes in ([large], [small], [large, small]):
        plans = remat.plan_run(
            TI2V_5B, shapes, lora.TARGETS[:3], 2, None, room_bytes, max_graph_tokens=4096
        )
        # a graph's memory stays while the other shape runs
        total = sum(plan.num_bytes for plan in plans.values())
        assert total <= room_bytes
        if any(plan.blocks is not None for plan in plans.values()):
            assert total > 0.9 * room_bytes or (shapes == [small])
    assert (plans[large].blocks is None) == (room_gib == 100.0)
    graph_alone = remat.plan_run(
        TI2V_5B, [small], lora.TARGETS[:3], 2, None, room_bytes, max_graph_tokens=4096
    )
    assert graph_alone[small].blocks is None  # nobody else needs the room


def test_the_allowance_of_the_raw_path_is_of_the_largest_picture_and_larger_for_clips() -> None:
    small, wide = Bucket(832, 480, 9), Bucket(1280, 704, 1)
    assert remat.raw_bytes([small], False) < remat.raw_bytes([wide, small], False) < 2 * 2**30
    assert remat.raw_bytes([wide, small], True) > 8 * 2**30


def test_auto_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match='on a CPU use "block" or "all"'):
        remat.room_bytes(CPU)
