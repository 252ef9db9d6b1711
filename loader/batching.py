"""How a global batch is cut up: over ranks, and into micro-batches of a rank. Torch-free.

Nothing here changes which samples a step sees, nor their seeds; only who computes them, and how
many at a time.
"""

from typing import NamedTuple

from loader.manifest import Split


class Batching(NamedTuple):
    """How the samples of a split become batches, and which of them this rank gets.

    `global_batch` counts the samples of one optimizer step, over all ranks. A rank's share is cut
    into micro-batches of `micro_batch` samples, or, where `micro_tokens` is not 0, of as many as
    `micro_batch_for` allows for their bucket. `window_shards` bounds the shards in use at a time
    per bucket.
    """

    global_batch: int
    micro_batch: int = 1
    micro_tokens: int = 0
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    split: Split = "train"
    window_shards: int = 32

    def check(self) -> None:
        """Raises ValueError where the ranks would not get equally many whole micro-batches."""
        micro_batch = 1 if self.micro_tokens else self.micro_batch
        if self.global_batch % (micro_batch * self.world_size):
            raise ValueError(
                f"global batch {self.global_batch} is not a multiple of micro-batch {micro_batch} "
                f"x world size {self.world_size}; every rank must get the same number of whole "
                f"micro-batches"
            )

    def micro_batch_of(self, num_tokens: int) -> int:
        """Samples of a micro-batch whose samples have `num_tokens` tokens each."""
        if not self.micro_tokens:
            return self.micro_batch
        return micro_batch_for(self.global_batch // self.world_size, num_tokens, self.micro_tokens)


def micro_slice(step: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Samples of a global batch that `rank` gets in its micro-step `step`; 2 ranks x 1 step == 1
    rank x 2 steps.
    """
    start = (step * world_size + rank) * micro_batch
    return slice(start, start + micro_batch)


def micro_batch_for(share: int, num_tokens: int, micro_tokens: int) -> int:
    """The largest divisor of a rank's `share` of the global batch whose tokens, `num_tokens` a
    sample, are at most `micro_tokens`; 1 where a single sample has more.
    """
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    return max(size for size in divisors if size == 1 or size * num_tokens <= micro_tokens)
