"""How much memory this host has for a process and those beside it: the kernel's figures, and the
limits of control groups.
"""

from pathlib import Path
from typing import NamedTuple


def available_bytes() -> int:
    """What processes can still take of this host: of its memory, and of the limits of the control
    groups that this process is in.
    """
    available = meminfo_bytes(Path("/proc/meminfo").read_text(), "MemAvailable")
    for group in cgroups(_read(Path("/proc/self/cgroup"))):
        room = cgroup_room_bytes(_read(group.limit), _read(group.used), _read(group.stat))
        if room is not None:
            available = min(available, room)
    return available


def total_bytes() -> int:
    """What processes may have of this host: its memory, or the lowest limit of those groups."""
    total = meminfo_bytes(Path("/proc/meminfo").read_text(), "MemTotal")
    limits = [_read(group.limit).strip() for group in cgroups(_read(Path("/proc/self/cgroup")))]
    return min(total, *(int(limit) for limit in limits if limit.isdigit()))


def meminfo_bytes(meminfo: str, name: str) -> int:
    """A line of /proc/meminfo."""
    (line,) = (line for line in meminfo.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def cgroup_room_bytes(limit: str, used: str, stat: str) -> int | None:
    """What a control group may still take; None: it has no limit. Cached files count as used, but
    give way.
    """
    if not limit.strip().isdigit() or not used.strip().isdigit():
        return None
    values = dict(line.split() for line in stat.splitlines())
    # version 1 counts the groups inside only in the sums that are called total
    cached = sum(
        int(values.get(f"total_{name}", values.get(name, 0)))
        for name in ("inactive_file", "active_file")
    )
    return max(int(limit) - int(used) + cached, 0)


class CGroup(NamedTuple):
    """The files of a control group that say how much memory it may have."""

    limit: Path
    used: Path
    stat: Path


# version 2 has one tree; in version 1, which Ubuntu 20.04 and RHEL 8 still start with, each
# controller has its own, and both may be there
_V2 = (Path("/sys/fs/cgroup"), "memory.max", "memory.current")
_V1 = (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")


def cgroups(proc_self_cgroup: str) -> list[CGroup]:
    """The control groups that limit the memory of a process, and those around them."""
    found = []
    for line in proc_self_cgroup.splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used = _V1 if controllers else _V2
        folder = root / path.lstrip("/")
        # in a container the path may be that of the host, and only the root is there
        for place in (folder, *folder.parents):
            if place.is_relative_to(root):
                found.append(CGroup(place / limit, place / used, place / "memory.stat"))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
