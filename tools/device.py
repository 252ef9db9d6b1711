"""The option --device of a tool: "cuda" is a choice only where there is a GPU, so that nothing is
read for one that is not there.
"""

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    """The default is the GPU, where there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[-1])
