"""Work in threads, shared out so that one slow host never takes the workers of the others."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_parallel(
    items: Iterable[ItemT],
    work: Callable[[ItemT], ResultT],
    *,
    workers: int,
    host_of: Callable[[ItemT], str] = lambda item: "",
    per_host: int = 1,
    max_waiting: int = 4096,
) -> Iterator[tuple[ItemT, ResultT]]:
    """Run `work` over `items` in threads: at most `workers` at once, and `per_host` for each host
    that `host_of` names ("": no limit).

    Yields (item, result) as they end, in no fixed order; an exception of `work` is raised here.
    Reads at most `max_waiting` items ahead.
    """
    queues: dict[str, deque[ItemT]] = {}
    running: dict[Future[ResultT], tuple[str, ItemT]] = {}
    busy: dict[str, int] = {}
    source, exhausted = iter(items), False
    with ThreadPoolExecutor(workers) as pool:
        while True:
            # read ahead, into one queue for each host
            while not exhausted and sum(map(len, queues.values())) < max(max_waiting, workers):
                item = next(source, None)
                if item is None:
                    exhausted = True
                else:
                    queues.setdefault(host_of(item), deque()).append(item)

            # start what may run now
            for host in list(queues):
                while (
                    queues[host]
                    and len(running) < workers
                    and (not host or busy.get(host, 0) < per_host)
                ):
                    item = queues[host].popleft()
                    running[pool.submit(work, item)] = host, item
                    busy[host] = busy.get(host, 0) + 1
                if not queues[host]:
                    del queues[host]
            if not running:
                return

            for future in wait(running, return_when=FIRST_COMPLETED).done:
                host, item = running.pop(future)
                busy[host] -= 1
                yield item, future.result()
