"""The kernels between attention's GEMMs as machine code, by the compiler in Triton's wheel: no GPU
is needed for that.
"""

import subprocess
from itertools import product

import pytest
from compiled import outputs

COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from train.kernels import attention_gemm_triton as kernels

CAPABILITY, NUM_KEYS = int(sys.argv[1]), int(sys.argv[2])
FLOAT32, ALIGNED = ("lse", "delta"), ("row_stride", "s_head")
POINTERS = ("s", "dp", "x", "y")
SIZE = kernels.block_and_warps(NUM_KEYS)
for name, (block, num_warps) in {"_softmax": SIZE, "_softmax_backward": SIZE,
                                 "_row_dots": (128, 4)}.items():
    function = getattr(kernels, name)
    flags = dict(P_SCALE=2.0**15, DS_SCALE=2.0**8, BLOCK=block, WIDTH=128, ROWS=kernels.DOT_ROWS,
                 NUM_BLOCKS=triton.cdiv(NUM_KEYS, block))
    types, attributes, constants = {}, {}, {}
    for place, parameter in enumerate(function.params):
        n = parameter.name
        if parameter.is_constexpr:
            types[n], constants[(place,)] = "constexpr", flags[n]
            continue
        types[n] = ("*fp32" if n in FLOAT32 or (name, n) == ("_row_dots", "out") else
                    "*fp16" if n in POINTERS else "i32")
        if types[n] != "i32" or n in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    binary = compile(ASTSource(function, types, constants, attributes),
                     target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True,
                               capture_output=True, text=True)
    line = next(line for line in usage.stdout.splitlines() if "STACK" in line)
    wide = sum("ld.global.v4" in line for line in binary.asm["ptx"].splitlines())
    print(name, "wide" if wide else "narrow", *line.split())
"""


CAPABILITIES, NUM_KEYS = ("70", "90"), ("512", "46800")


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, ...], subprocess.CompletedProcess[str]]:
    return outputs(COMPILE, list(product(CAPABILITIES, NUM_KEYS)), timeout_s=900)


@pytest.mark.parametrize("num_keys", NUM_KEYS)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=["V100", "Hopper"])
def test_nothing_spills_and_loads_are_wide(
    capability: str,
    num_keys: str,
    runs: dict[tuple[str, ...], subprocess.CompletedProcess[str]],
) -> None:
    run = runs[capability, num_keys]
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == ["_softmax", "_softmax_backward", "_row_dots"]
    for name, width, *usage in lines:
        assert "STACK:0" in usage and "LOCAL:0" in usage, (name, usage)
        assert width == "wide" or name == "_row_dots"
