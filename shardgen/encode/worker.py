"""What a worker runs. The models are imported when it starts on its first unit, because the
program that hands out the units imports this module too and needs none of them.
"""

from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult


def encode_unit(
    job: ShardJob | None, spec: EncodeSpec, decode_threads: int = 2
) -> ShardResult | None:
    """Write a shard, or, for None, the empty prompt. Raises what `encode_shard` raises."""
    import torch

    from shardgen.encode.shard import EncodeError, encode_empty_prompt, encode_shard

    try:
        if job is not None:
            return encode_shard(job, spec, decode_threads)
        encode_empty_prompt(spec)
        return None
    except torch.OutOfMemoryError as error:
        raise EncodeError(
            f"the GPU's memory is full ({error}); lower encode.vae_batch or encode.text_batch"
        ) from error
