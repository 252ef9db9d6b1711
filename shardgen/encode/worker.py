"""What a worker runs. The models are imported when it starts on its first unit, because the
program that hands out the units imports this module too and needs none of them.
"""

from shardgen.encode.unit import EncodeSpec, ShardJob, ShardResult


def encode_unit(
    job: ShardJob | None,
    upcoming: ShardJob | None = None,
    *,
    spec: EncodeSpec,
    decode_threads: int = 2,
) -> ShardResult | None:
    """Write a shard, or, for None, the empty prompt. Raises what `encode_shard` raises.

    `upcoming` is what this worker is given next, if that is known: its clips are decoded ahead.
    """
    import torch

    from shardgen.encode.decoding import EncodeError
    from shardgen.encode.shard import encode_empty_prompt, encode_shard

    try:
        if job is not None:
            return encode_shard(job, spec, decode_threads, upcoming)
        encode_empty_prompt(spec)
        return None
    except torch.OutOfMemoryError as error:
        raise EncodeError(
            f"the GPU's memory is full ({error}); lower encode.vae_memory_gib or encode.text_batch"
        ) from error
