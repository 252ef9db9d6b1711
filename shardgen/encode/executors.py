"""Who runs the units of work: a pool of processes here, or a Ray cluster. Both take the same
units and change no byte.

A unit is a top-level function of one value. Results come in the order in which they are ready,
which nothing may depend on. Units that fail are handed back as exceptions of type ValueError or
OSError, because the other units can still be done; anything else is our bug and ends the run. At
most a few units more than there are workers are in flight, so the list of units may be long and
lazy.

Workers are spawned, not forked (CUDA and threads do not survive a fork), and end with the
program, however it ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from loader.config import ConfigError

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Failure = ValueError | OSError
WORKER_DIED = (
    "a worker process died: killed from outside, or out of memory (then take fewer workers). What "
    "was finished stands; run the build again to go on"
)
_AHEAD = 2  # units in flight per worker: one at work, one to go on with


class ExecutorError(RuntimeError):
    """The workers themselves failed; what they had finished stands, and a second run goes on from
    there.
    """


def run_local(
    function: Callable[[Unit], Result],
    units: Iterable[Unit],
    num_workers: int,
    environments: Sequence[dict[str, str]] = (),
) -> Iterator[tuple[Unit, Result | Failure]]:
    """Run `function` on each unit in `num_workers` processes; yields (unit, result or failure).

    Worker i starts with environments[i] set (one GPU each: CUDA_VISIBLE_DEVICES). Raises
    ExecutorError if a worker dies.
    """
    remaining = iter(units)
    pool = open_pool(num_workers, environments)
    running: dict[Future[Result], Unit] = {}
    try:
        while True:
            # Fill up what is in flight, then hand out whatever is ready.
            for unit in islice(remaining, _AHEAD * num_workers - len(running)):
                running[pool.submit(function, unit)] = unit
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                try:
                    yield unit, future.result()
                except (ValueError, OSError) as error:
                    yield unit, error
    except BrokenProcessPool as error:
        raise ExecutorError(WORKER_DIED) from error
    finally:
        pool.shutdown(cancel_futures=True)


def open_pool(num_workers: int, environments: Sequence[dict[str, str]]) -> ProcessPoolExecutor:
    """Processes that end with this one; worker i has environments[i] set, if there are any."""
    # Each worker takes one environment out of this queue when it starts.
    context = multiprocessing.get_context("spawn")
    settings = context.SimpleQueue()
    for i in range(num_workers):
        settings.put(environments[i] if environments else {})
    return ProcessPoolExecutor(num_workers, context, _start_worker, (settings,))


def run_ray(
    function: Callable[[Unit], Result],
    units: Iterable[Unit],
    num_workers: int,
    address: str,
    environment: dict[str, str],
    num_cpus: int,
    num_gpus: int,
) -> Iterator[tuple[Unit, Result | Failure]]:
    """Run `function` on each unit on a Ray cluster, each with `num_cpus` and `num_gpus`; yields
    as `run_local` does.

    `address` is the cluster's; "" starts one here with room for `num_workers`. Without a unit,
    Ray isn't even imported. A unit whose node or worker dies is run again elsewhere: it is
    idempotent. Raises ExecutorError if Ray is missing, or gives a unit up.
    """
    remaining = iter(units)
    first = list(islice(remaining, 1))
    if not first:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ExecutorError(
            "executor.kind = \"ray\" needs the package ray: pip install 'newsreel[ray]'"
        ) from error
    # A cluster of our own gets just the CPUs that the workers need.
    own = {} if address else {"num_cpus": num_workers * num_cpus, "include_dashboard": False}
    remaining = chain(first, remaining)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **own)
        remote = ray.remote(function_of_unit).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_retries=5,
            runtime_env={"env_vars": environment},
        )
        running: dict[Any, Unit] = {}
        while True:
            for unit in islice(remaining, _AHEAD * num_workers - len(running)):
                running[remote.remote(function, unit)] = unit
            if not running:
                return
            for reference in ray.wait(list(running), num_returns=1)[0]:
                unit = running.pop(reference)
                try:
                    yield unit, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, Failure):
                        raise
                    yield unit, error.cause
    except (
        ray.exceptions.RaySystemError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
        ConnectionError,
    ) as error:
        raise ExecutorError(
            f"the Ray cluster failed: {error}. What was finished stands; run the build again to go "
            f"on"
        ) from error
    finally:
        ray.shutdown()


def worker_environments(workers: int, device: str, threads: int) -> list[dict[str, str]]:
    """Threads for each worker, and on CUDA one of the visible GPUs, in turn. Raises ConfigError."""
    environment = thread_environment(threads)
    if device != "cuda":
        return [environment] * workers
    every = ",".join(map(str, range(workers)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    if len(visible) < workers:
        raise ConfigError(
            f"executor.workers = {workers}, but CUDA_VISIBLE_DEVICES names {visible}: on CUDA a "
            f"worker needs a GPU of its own"
        )
    return [environment | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible[:workers]]


def thread_environment(threads: int) -> dict[str, str]:
    """Threads per process, for libraries that read them once when they are loaded."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def function_of_unit(function: Callable[[Unit], Result], unit: Unit) -> Result:
    """What a Ray task calls: a partial can't be made remote itself."""
    return function(unit)


def _start_worker(settings: Any) -> None:
    os.environ.update(settings.get())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program; it ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
