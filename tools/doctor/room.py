"""How much a run writes, before it starts: the LoRA files of every validated step stay, which of a
high rank and a long run are more than its checkpoints.
"""

from pathlib import Path

from tools.budget import order_of
from tools.counts import num_adapter_parameters
from train.base import transformer_folder
from train.config import TrainConfig, in_steps
from train.lora.config import parse_blocks
from train.model.load import WeightsError, read_config
from train.model.wan import TI2V_5B
from train.optim import state_bytes

# metrics, TensorBoard, samples: an allowance, not measured
OTHER_BYTES = 2 * 2**30


def run_bytes(config: TrainConfig) -> float:
    """What the output folder holds at the end of the run, or at its fullest. Without the datasets
    the length of a run that is given in epochs is not known: one validation is counted then.
    """
    try:
        wan = read_config(Path(config.model.path) / transformer_folder(config) / "config.json")
    except WeightsError:
        wan = TI2V_5B
    blocks = parse_blocks(config.lora.blocks, wan.num_layers)
    num_parameters = num_adapter_parameters(wan, config.lora.targets, config.lora.rank, len(blocks))
    # parameters, and perhaps their average, beside the optimizer's
    checkpoint_bytes = num_parameters * (8 + state_bytes(config.optim))
    lora_dtype_bytes = 2 if config.checkpoint.lora_dtype == "bfloat16" else 4
    # for diffusers and for ComfyUI
    lora_bytes = 2 * num_parameters * lora_dtype_bytes
    # the newest ones, the best, and the one that is being written
    num_states = config.checkpoint.keep_newest + 2
    num_loras = num_states + _num_validations(config)
    return num_states * checkpoint_bytes + num_loras * lora_bytes + OTHER_BYTES


def _num_validations(config: TrainConfig) -> int:
    if not config.validation.every:
        return 1
    num_batches = 0
    if config.num_epochs:
        try:
            num_batches = sum(order_of(config).batches_per_epoch)
        except (ValueError, OSError):
            return 1
    return 1 + in_steps(config, num_batches).num_steps // config.validation.every
