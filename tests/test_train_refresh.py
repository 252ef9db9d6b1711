"""The copies of adapters in the compute dtype, by one kernel as one by one."""

from pathlib import Path

import pytest
import torch

from train import optim
from train.lora import adapters as lora
from train.model.load import load_transformer


@pytest.mark.parametrize(
    ("dtype", "rank", "nf4"),
    [(torch.float16, 8, False), (torch.float16, 200, False), (torch.float32, 8, True)],
)
def test_refresh_copies_and_scales_every_adapter_in_one_kernel(
    tiny_checkpoint: Path, dtype: torch.dtype, rank: int, nf4: bool
) -> None:
    """Also after the optimizer has moved the parameters, or someone else one of them; rank 200
    takes several blocks.
    """
    model = load_transformer(tiny_checkpoint, torch.device("cpu"), dtype)
    adapters = lora.attach(model, lora.TARGETS, rank, 20.0, dropout=0.0, seed=1, nf4=nf4)
    last = adapters.parameters()[-1]
    for move in (
        lambda: None,
        lambda: optim.flatten(adapters.parameters()),
        lambda: setattr(last, "data", last.data.clone()),
    ):
        move()
        for parameter in adapters.parameters():
            parameter.data.normal_()
        copies = adapters.copies()
        adapters.refresh()
        expected = [destination.clone() for destination, _, _ in copies]
        for destination, _, _ in copies:
            destination.fill_(float("nan"))
        adapters.refresh_in_one_kernel()
        for (destination, _, _), reference in zip(copies, expected, strict=True):
            assert torch.equal(destination, reference)
