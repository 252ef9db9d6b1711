"""Where the processes of a run find each other: torch's store, and a part of it that is new at each
start.

The store of torchrun's agent stays when torchrun starts the processes again, with the addresses of
those that are gone, and torch takes them for the new ones. Numbers of attempts are no name for a
start: the agents of several hosts don't count alike.
"""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# for all processes to come, of which some may still be reading their programs from a slow disk
MEET_S = 1800


def open_store(rank: int) -> Any:
    """torch's store at the address that torchrun gives: that of its agent, or else of rank 0.
    Raises RuntimeError where it can't be reached, ValueError without torchrun.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set and {missing[0]} is not; start the run by torchrun")
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not is_agents,
        timeout=timedelta(seconds=MEET_S),
        wait_for_workers=False,
    )


def meet(store: Any, rank: int, size: int) -> Any:
    """A part of `store` that is new at this start, the same for all `size` processes.

    Rank 0 makes up a name, which the others answer with one of theirs, until they find theirs among
    the answers that it took: then its name is not one that an earlier rank 0 has left. Raises
    RuntimeError if not all of them come.
    """
    mine, deadline_s = uuid.uuid4().hex, time.monotonic() + MEET_S
    if rank == 0:
        store.set("newsreel/start", mine)
    while time.monotonic() < deadline_s:
        if store.check(["newsreel/start"]):
            start = store.get("newsreel/start").decode()
            store.set(f"newsreel/{start}/{rank}", mine)
            answers = [f"newsreel/{start}/{each}" for each in range(size)]
            if start == mine and store.check(answers):
                taken = ",".join(store.get(answer).decode() for answer in answers)
                store.set(f"newsreel/{start}/taken", taken)
            if store.check([f"newsreel/{start}/taken"]):
                if mine in store.get(f"newsreel/{start}/taken").decode().split(","):
                    prefix = f"newsreel/{start}"
                    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        # a signal is heeded between two questions
        time.sleep(0.02)
    raise RuntimeError(f"not all of the {size} processes came in {MEET_S} s")
