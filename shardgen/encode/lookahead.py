"""Units of work for the processes of this machine, each told what it is given next.

A worker that knows its next shard decodes the first clips of it while the present one's texts are
encoded and its files are written. So each worker has a process pool of its own, with one unit
under way and one promised; when no more are left, an idle worker takes what was promised to
another.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice

from shardgen.encode.config import ExecutorConfig
from shardgen.encode.executors import (
    WORKER_DIED,
    ExecutorError,
    Failure,
    Result,
    Unit,
    open_pool,
    run_ray,
    thread_environment,
    worker_environments,
)


def run_looking_ahead(
    function: Callable[[Unit, Unit | None], Result],
    units: Iterable[Unit],
    environments: Sequence[dict[str, str]],
) -> Iterator[tuple[Unit, Result | Failure]]:
    """Run `function(unit, next unit)` in a process for each environment; yields as `run_local`
    does. The next unit is None where none is known, and only a hint.

    Raises ExecutorError if a worker dies.
    """
    remaining = iter(units)
    pools = [open_pool(1, [environment]) for environment in environments]
    promised: list[list[Unit]] = [[] for _ in pools]
    running: dict[Future[Result], tuple[int, Unit]] = {}

    def take(worker: int) -> list[Unit]:
        """One unit, or none: this worker's own, a new one, or one that another was promised."""
        if promised[worker]:
            return [promised[worker].pop()]
        if new := list(islice(remaining, 1)):
            return new
        return next(([others.pop()] for others in promised if others), [])

    def give(worker: int) -> None:
        for unit in take(worker):
            promised[worker] += islice(remaining, 1)
            upcoming = promised[worker][0] if promised[worker] else None
            running[pools[worker].submit(function, unit, upcoming)] = (worker, unit)

    try:
        for worker in range(len(pools)):
            give(worker)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, unit = running.pop(future)
                give(worker)
                try:
                    yield unit, future.result()
                except (ValueError, OSError) as error:
                    yield unit, error
    except BrokenProcessPool as error:
        raise ExecutorError(WORKER_DIED) from error
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _alone(function: Callable[[Unit, Unit | None], Result], unit: Unit) -> Result:
    return function(unit, None)


def run_units(
    function: Callable[[Unit, Unit | None], Result],
    units: Iterable[Unit],
    executor: ExecutorConfig,
    *,
    device: str,
    threads: int,
) -> Iterator[tuple[Unit, Result | Failure]]:
    """The executor that the configuration names, with `threads` per unit and, on CUDA, a GPU.

    `function(unit, next unit)` hears of the next one on this machine only: where a Ray cluster
    runs it isn't known before.
    """
    if executor.kind == "local":
        environments = worker_environments(executor.workers, device, threads)
        return run_looking_ahead(function, units, environments)
    return run_ray(
        partial(_alone, function),
        units,
        executor.workers,
        executor.address,
        environment=thread_environment(threads),
        num_cpus=threads,
        num_gpus=int(device == "cuda"),
    )
