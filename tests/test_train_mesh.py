"""The group of a run's processes, from a fresh interpreter: what torch imports late counts."""

import os
import socket
import subprocess
import sys

from trainer_runs import ROOT

# The first optimizer imports torch._dynamo.
TWO_PROCESSES = """
import os
import sys
import torch
from train.parallel import mesh

child = os.fork()
os.environ["RANK"] = str(int(child == 0))
with mesh.process_group() as world:
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    mesh.barrier(world)
assert "torch._dynamo" in sys.modules
tasks = "/proc/self/task"
threads = [open(f"{tasks}/{thread}/comm").read() for thread in os.listdir(tasks)]
assert not [name for name in threads if "gloo" in name], threads
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_no_thread_of_gloo_outlives_the_group() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES],
        cwd=ROOT,
        env=os.environ | group | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
