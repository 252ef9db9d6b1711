"""Whether the device that was asked for is there, looked at before anything is written."""

from loader.config import ConfigError
from shardgen.encode.config import EncodeConfig, ExecutorConfig


def check_device(encode: EncodeConfig, executor: ExecutorConfig) -> None:
    """Raises ConfigError if shards are to be encoded on GPUs of this machine and it lacks them.
    The machines of a Ray cluster are not this one: each worker there looks for itself.
    """
    if encode.device == "cuda" and encode.vae_batch != 1:
        raise ConfigError(
            f"encode.vae_batch = {encode.vae_batch} is for a CPU: on CUDA the batch follows from "
            f"encode.vae_memory_gib and the window's shape; remove encode.vae_batch"
        )
    is_elsewhere = executor.kind == "ray" and executor.address
    if encode.device == "cpu" or is_elsewhere:
        return
    import torch  # takes seconds, and the program that plans needs it for this alone

    if not torch.cuda.is_available():
        raise ConfigError(
            'encode.device = "cuda": no GPU can be used here (torch.cuda.is_available() is '
            'False); check the driver with nvidia-smi, or set encode.device = "cpu"'
        )
    num_gpus = torch.cuda.device_count()
    if executor.kind == "local" and executor.workers > num_gpus:
        raise ConfigError(
            f"executor.workers = {executor.workers}, but {num_gpus} GPUs can be used here: on "
            f"CUDA a worker needs a GPU of its own; set executor.workers = {num_gpus}"
        )
