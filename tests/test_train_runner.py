"""What is saved is a matter of bytes and time only: the gradients are the same bit for bit."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
)
from torch.utils.checkpoint import checkpoint

from train.activations import plan, runner
from train.activations.offload import HostInputs
from train.activations.saved import contexts
from train.activations.sizes import Shape, output_bytes
from train.lora import adapters as lora
from train.model.attention import OPERATIONS, choose_attention, run_kernel
from train.model.load import load_transformer
from train.model.tag import tagged
from train.model.wan import Wan

CPU = torch.device("cpu")
TOKENS, TEXT_TOKENS = 2 * 3 * 4, 512
SHAPE = Shape(2, TOKENS, TEXT_TOKENS)


class Count(TorchDispatchMode):
    """Counts the operations that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[func] += 1
        return func(*args, **(kwargs or {}))


def gradients(
    folder: Path,
    budget_bytes: float,
    offload: bool = False,
    targets: tuple[str, ...] = lora.TARGETS,
    blocks: tuple[int, ...] = (0, 1),
) -> tuple[list[Tensor], Counter[Any], Wan]:
    model = load_transformer(folder, CPU, torch.float32)
    adapters = lora.attach(model, targets, 8, 20.0, dropout=0.1, seed=1, blocks=blocks)
    adapters.set_seeds(torch.tensor([7, 8]))
    for _, b in adapters.tensors().values():
        b.normal_(generator=torch.Generator().manual_seed(0))
    adapters.refresh()
    generator = torch.Generator().manual_seed(3)
    latent, text = (
        torch.randn(2, *shape, generator=generator) for shape in ((48, 2, 6, 8), (TEXT_TOKENS, 32))
    )
    attention = choose_attention("auto", CPU, torch.float32).attention
    plans = plan.plan_run(
        model.config,
        [SHAPE],
        targets,
        4,
        budget_bytes,
        0.0,
        max_graph_tokens=0,
        offload=offload,
        first_block=blocks[0],
    )
    with Count() as count:
        velocity = model(
            latent,
            torch.tensor([[0.0, 700.0]] * 2),
            torch.tensor([0, 1]),
            text,
            attention,
            runner.block_runner(model, plans, blocks[0]),
        )
        velocity.square().mean().backward()
    return [p.grad for p in adapters.parameters() if p.grad is not None], count.operations, model


def test_every_budget_gives_the_same_bits_and_a_larger_one_computes_less_again(
    tiny_checkpoint: Path,
) -> None:
    expected, operations, model = gradients(tiny_checkpoint, float("inf"))
    sizes = output_bytes(model.config, TOKENS, TEXT_TOKENS, 4)
    everything = 2 * 2 * sum(sizes.values())  # two samples, two blocks
    budgets = [0, 2 * sizes["attn1"], 4 * sizes["attn1"], everything // 2, everything]
    num_gemms, num_attentions = [], []
    for budget_bytes in budgets:
        found, operations, _ = gradients(tiny_checkpoint, budget_bytes)
        assert all(map(torch.equal, found, expected))
        num_gemms.append(operations[torch.ops.aten.addmm.default])
        num_attentions.append(sum(operations[op] for op in OPERATIONS))
    # two blocks, self and cross, once or twice
    assert num_attentions[:3] == [8, 7, 6] and num_attentions[4] == 4
    assert num_gemms[0] == num_gemms[2] > num_gemms[3] > num_gemms[4]


class Recording(HostInputs):
    """Notes how many of the tensors that autograd saves in each block are offloaded."""

    blocks: list[tuple[int, int]]  # (inputs offered, of them offloaded), in the order of calls

    def hooks(
        self, block: int, inputs: Sequence[Tensor]
    ) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        pack, unpack = super().hooks(block, inputs)
        number = len(self.blocks)
        self.blocks.append((len(inputs), 0))

        def counting(tensor: Tensor) -> Any:
            packed = pack(tensor)
            offered, offloaded = self.blocks[number]
            self.blocks[number] = (offered, offloaded + (packed is not tensor))
            return packed

        return counting, unpack


@pytest.mark.parametrize(("targets", "num_offloaded"), [(lora.TARGETS, 1), (lora.TARGETS[:3], 2)])
def test_offloaded_inputs_give_the_same_bits(
    targets: tuple[str, ...],
    num_offloaded: int,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pending residual is offloaded too, unless an adapted ffn.down saves it as its output.
    Block 0 has none.
    """
    monkeypatch.setattr(Recording, "blocks", [], raising=False)
    monkeypatch.setattr(runner, "HostInputs", Recording)
    for budget_bytes in (0.0, 1e5):
        expected, operations, _ = gradients(tiny_checkpoint, budget_bytes, targets=targets)
        found, with_offload, _ = gradients(
            tiny_checkpoint, budget_bytes, offload=True, targets=targets
        )
        assert all(map(torch.equal, found, expected))
        assert (
            with_offload[torch.ops.aten.addmm.default] == operations[torch.ops.aten.addmm.default]
        )
    assert Recording.blocks == 2 * [(1, 1), (num_offloaded, num_offloaded)]


def test_an_operation_is_saved_by_its_tag_whatever_its_bias_or_order() -> None:
    """Two attentions in the other order and a GEMM without a bias: neither a bias's address nor a
    count of calls would tell them.
    """
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 8)

    def function(x: Tensor) -> Tensor:
        with tagged("second"):
            y = F.linear(x, weight)
        with tagged("first"):
            return F.linear(y.tanh(), weight).sin()

    operations = []
    for saved in (frozenset[str](), frozenset({"first"}), frozenset({"first", "second"})):
        with Count() as count:
            out = checkpoint(function, x, use_reentrant=False, context_fn=partial(contexts, saved))
            out.sum().backward()
        operations.append(count.operations[torch.ops.aten.mm.default])
    # two forward, two backward, and two, one or none recomputed
    assert operations == [6, 5, 4]


def test_what_is_saved_is_found_by_the_thread_that_recomputes() -> None:
    """On a GPU autograd has one of its own."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8)

    def function(x: Tensor) -> Tensor:
        with tagged("first"):
            y = F.linear(x.sin(), weight)
        return F.linear(y.exp(), weight)

    context_fn = partial(contexts, frozenset({"first"}))
    loss = checkpoint(function, x, use_reentrant=False, context_fn=context_fn).sum()
    counts = []

    def backward() -> None:
        with Count() as count:
            loss.backward()
        counts.append(count.operations[torch.ops.aten.mm.default])

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    # of both gradients; the second GEMM's output nobody asks for
    assert counts == [2]
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_only_tags_of_which_something_is_saved_pass_through_python() -> None:
    """A mode around the whole block took more time than all else that the host does in a step."""
    active: list[bool] = []

    def note() -> None:
        active.append(bool(_get_current_dispatch_mode_stack()))

    def function(x: Tensor) -> Tensor:
        note()
        with tagged("first"):
            note()
            x = x.sin()
        with tagged("second"):
            note()
            x = F.linear(x, torch.eye(4))
        note()
        return x.sin()

    x = torch.randn(4, 4, requires_grad=True)
    saved = frozenset({"second"})
    checkpoint(
        function, x, use_reentrant=False, context_fn=partial(contexts, saved)
    ).sum().backward()
    # forward, and again to the last tensor that the backward pass needs
    assert active == 2 * [False, False, True, False]


def test_what_is_saved_and_then_changed_is_not_taken_for_the_output() -> None:
    x = torch.randn(4, 4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        with tagged("first"):
            y = F.linear(x.sin(), torch.eye(4))
        z = y.exp()
        with torch.no_grad():
            y.mul_(2)
        return z.sin()

    saved = frozenset({"first"})
    out = checkpoint(function, x, use_reentrant=False, context_fn=partial(contexts, saved))
    with pytest.raises(AssertionError, match="its output was changed"):
        out.sum().backward()


def test_blocks_before_the_first_adapter_run_once_and_save_nothing(tiny_checkpoint: Path) -> None:
    expected, operations, _ = gradients(tiny_checkpoint, float("inf"), blocks=(1,))
    assert sum(operations[op] for op in OPERATIONS) == 4
    for offload in (False, True):
        found, operations, _ = gradients(tiny_checkpoint, 0.0, offload, blocks=(1,))
        assert all(map(torch.equal, found, expected))
        # two of block 0, and those of block 1 twice
        assert sum(operations[op] for op in OPERATIONS) == 6

    model = load_transformer(tiny_checkpoint, CPU, torch.float32)
    lora.attach(model, lora.TARGETS, 8, 20.0, dropout=0.0, seed=1, blocks=(1,))
    plans = {SHAPE: plan.ShapePlan([frozenset()], 0.0)}
    run_block = runner.block_runner(model, plans, first_block=1)
    assert run_block is not None
    needs_gradient = []

    def noting(*arguments: Any) -> tuple[Tensor, Tensor]:
        out = run_block(*arguments)
        needs_gradient.append([part.requires_grad for part in out])
        return out

    latent, text = torch.randn(2, 48, 2, 6, 8), torch.randn(2, TEXT_TOKENS, 32)
    attention = choose_attention("auto", CPU, torch.float32).attention
    model(latent, torch.zeros(2, 2), torch.zeros(2), text, attention, noting)
    assert needs_gradient == [[False, False], [True, True]]


def test_the_output_of_attention_from_gemms_is_saved_like_any_other() -> None:
    q, k, v = (torch.randn(1, 2, 6, 16, requires_grad=True) for _ in range(3))
    forward = torch.ops.newsreel.gemm_attention_forward.default

    def function() -> Tensor:
        with tagged("attn1"):
            return run_kernel("gemm", q, k, v).sin()

    counts, found = [], []
    for saved in (frozenset[str](), frozenset({"attn1"})):
        with Count() as count:
            out = checkpoint(function, use_reentrant=False, context_fn=partial(contexts, saved))
            found.append(torch.autograd.grad(out.sum(), (q, k, v)))
        counts.append(count.operations[forward])
    assert counts == [2, 1]
    assert all(map(torch.equal, *found))
