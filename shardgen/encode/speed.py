"""How fast shards were encoded, and what held them up."""

from dataclasses import dataclass, field

from shardgen.encode.unit import ShardTimes


@dataclass
class EncodeSpeed:
    """The times of all shards of a run, added up over its workers."""

    num_windows: int = 0
    elapsed_s: float = 0.0  # of the whole stage, the workers' start included
    times: list[ShardTimes] = field(default_factory=list)

    def add(self, num_windows: int, times: ShardTimes) -> None:
        self.num_windows += num_windows
        self.times.append(times)

    @property
    def busy_share(self) -> float:
        """Of the workers' time on shards, how much the models were at work."""
        busy_s = sum(times.vae_s + times.text_s for times in self.times)
        return busy_s / sum(times.wall_s for times in self.times)

    @property
    def limiting_stage(self) -> str:
        """Where most of that time went. Encoding goes on while frames are waited for, so a worker
        that waits for frames although its device is busy all the time is limited by the device.
        """
        seconds = {
            "decoding": sum(times.waiting_s for times in self.times),
            "VAE": sum(times.vae_s for times in self.times),
            "text encoder": sum(times.text_s for times in self.times),
            "writing": sum(times.writing_s for times in self.times),
        }
        return max(seconds, key=lambda name: seconds[name])

    def summary(self) -> str:
        """One line for the end of a stage."""
        return (
            f"encode: {self.num_windows} windows, {self.num_windows / self.elapsed_s:.2f} a second "
            f"with the workers' start; models busy {100 * self.busy_share:.0f}% of the time on "
            f"shards; limited by: {self.limiting_stage}"
        )
