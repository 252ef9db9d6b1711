"""Scripts that compile kernels to machine code: some processes, as many at a time as there are
cores. The compiler uses one core, and the machine of a test run has two or more.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent


def outputs(
    script: str, commands: Sequence[tuple[str, ...]], timeout_s: float
) -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    """What `script` prints with each of these arguments. Kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout_s,
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))
