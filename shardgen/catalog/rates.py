"""How fast the last build in an output folder was: what `--dry-run` reckons hours from."""

from shardgen.catalog.database import Database

_RATE = "seconds_per_sample"


def remember_rate(database: Database, duration_s: float, num_samples: int) -> None:
    """Store the rate that a build has just had, all workers together."""
    if num_samples:
        database.remember(_RATE, f"{duration_s / num_samples:.6f}")


def recall_rate(database: Database) -> float | None:
    """Seconds per sample of the last build here; None if none was measured."""
    rate = database.recall(_RATE)
    return float(rate) if rate else None
