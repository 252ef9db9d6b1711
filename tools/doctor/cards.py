"""Checks of the GPUs. Without one each says so and is skipped: preparation works on a CPU."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from tools.doctor.finding import Finding

COPY_BYTES = 256 * 2**20
REDUCE_BYTES = 128 * 2**20
REDUCE_S = 120.0
SLOW_COPY_GB_S = 6.0  # half of PCIe 3.0 x16: both cards behind one switch
NO_GPU = "no GPU is visible to torch"


def cards() -> Iterator[Finding]:
    """Name, memory, driver, clocks and power limit, and whether torch has code for the card."""
    if not torch.cuda.is_available():
        advice = "for training: check the driver with nvidia-smi, and that torch is a CUDA build"
        yield Finding("gpu", "skipped", f"{NO_GPU}; torch {torch.__version__}", advice)
        return
    for index in range(torch.cuda.device_count()):
        yield from _card(index)


def _card(index: int) -> Iterator[Finding]:
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    yield Finding(
        f"gpu {index}",
        "ok",
        f"{properties.name}, {capability}, {properties.total_memory / 2**30:.1f} GiB, "
        + _nvml_text(index),
    )
    built = torch.cuda.get_arch_list()
    # Code for sm_80 runs on sm_86 and newer of the same major version, not on an older one.
    runs = any(
        name.startswith(f"sm_{properties.major}")
        and int(name[3:].rstrip("af")) <= int(capability[3:])
        for name in built
    )
    advice = "bash tools/install.sh v100 (torch 2.10.0 is the last wheel with sm_70)"
    yield Finding(
        f"torch for gpu {index}",
        "ok" if runs else "failure",
        f"torch {torch.__version__} has code for {', '.join(built)}",
        "" if runs else advice,
    )
    bfloat16 = properties.major >= 8
    yield Finding(
        f"dtypes on gpu {index}",
        "ok",
        "float16 and bfloat16" if bfloat16 else 'float16 only: model.dtype = "float16"',
    )


def _nvml_text(index: int) -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        driver = pynvml.nvmlSystemGetDriverVersion()
        power_w = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        return f"driver {driver}, at most {power_w:.0f} W and {clock_mhz} MHz"
    finally:
        pynvml.nvmlShutdown()


def host_copies() -> Iterator[Finding]:
    """Host-to-device rate of each card alone, then of all at once: a shared PCIe switch shows."""
    if not torch.cuda.is_available():
        yield Finding("host to device", "skipped", NO_GPU)
        return
    devices = list(range(torch.cuda.device_count()))
    alone = [_copy_gb_s([device]) for device in devices]
    text = ", ".join(f"gpu {d}: {rate:.1f} GB/s" for d, rate in zip(devices, alone, strict=True))
    if len(devices) > 1:
        text += f"; all at once {_copy_gb_s(devices) / len(devices):.1f} GB/s each"
    slow = min(alone) < SLOW_COPY_GB_S
    yield Finding(
        "host to device",
        "warning" if slow else "ok",
        text,
        "the card may sit in a slot with fewer lanes: see nvidia-smi -q, PCIe link width"
        if slow
        else "",
    )


def _copy_gb_s(devices: list[int]) -> float:
    """GB/s of all `devices` together, from pinned memory, the best of five."""
    hosts = [torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in devices]
    targets = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for device in devices]
    best_s = float("inf")
    for _ in range(6):  # the first one sets up
        for device in devices:
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        for host, target in zip(hosts, targets, strict=True):
            target.copy_(host, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return len(devices) * COPY_BYTES / best_s / 1e9


_ALL_REDUCE = """
import os, time, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
x = torch.full((32 * 2**20,), float(rank + 1), device="cuda")
dist.all_reduce(x)
assert x[0].item() == sum(range(1, dist.get_world_size() + 1)), "the sum is wrong"
torch.cuda.synchronize()
start = time.perf_counter()
for _ in range(5):
    dist.all_reduce(x)
torch.cuda.synchronize()
if rank == 0:
    print((time.perf_counter() - start) / 5)
dist.destroy_process_group()
"""


def all_reduce() -> Iterator[Finding]:
    """NCCL's all-reduce of 128 MiB between the cards, with and without peer-to-peer copies."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        yield Finding("all-reduce", "skipped", f"{count} GPU: nothing to reduce between")
        return
    for disabled in ("0", "1"):
        name = "all-reduce without P2P" if disabled == "1" else "all-reduce"
        with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
            program.write(_ALL_REDUCE)
            program.flush()
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(count), program.name]
            environment = {**os.environ, "NCCL_P2P_DISABLE": disabled}
            done = _run(command, environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            advice = "export NCCL_P2P_DISABLE=1" if disabled == "0" else "NCCL_DEBUG=INFO says why"
            yield Finding(name, "failure", (lines or ["it failed"])[-1], advice)
        else:
            seconds = float(done.stdout.strip().splitlines()[-1])
            # what each card sends and receives in a ring
            rate = 2 * (count - 1) / count * REDUCE_BYTES / seconds / 1e9
            text = f"128 MiB in {seconds * 1000:.1f} ms, {rate:.1f} GB/s, the sum is right"
            yield Finding(name, "ok", text)


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What it said; copies between cards that the board does not carry can hang for ever."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        stdout, stderr = process.communicate(timeout=REDUCE_S)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes itself, within 30 s
        process.terminate()
        process.communicate()
        return subprocess.CompletedProcess(
            command, returncode=1, stdout="", stderr=f"Error: no answer in {REDUCE_S:g} s"
        )


def video_engines() -> Iterator[Finding]:
    """One H.264 clip through NVENC and NVDEC, by the libraries that PyAV's wheel carries."""
    import av

    if not torch.cuda.is_available():
        yield Finding("video engines", "skipped", NO_GPU)
        return
    try:
        _encode("h264_nvenc")
        yield Finding("NVENC", "ok", "h264_nvenc encodes")
    except (av.error.FFmpegError, ValueError) as error:
        advice = 'clips are then encoded by encode.mp4_encoder = "libx264"'
        yield Finding("NVENC", "warning", f"h264_nvenc does not encode: {error}", advice)
    from av.codec.hwaccel import HWAccel

    clip = _encode("libx264")
    try:
        hwaccel = HWAccel("cuda", allow_software_fallback=False)
        with av.open(io.BytesIO(clip), hwaccel=hwaccel) as container:
            count = sum(1 for _ in container.decode(video=0))
        yield Finding("NVDEC", "ok", f"{count} frames of H.264 decoded")
    except (av.error.FFmpegError, RuntimeError) as error:
        advice = 'DALI decodes videos on NVDEC: data.condition = "raw" needs it, "latent" not'
        yield Finding("NVDEC", "warning", f"H.264 is not decoded: {error}", advice)


def _encode(codec: str) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        for level in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((192, 320, 3), level * 30, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def dali() -> Iterator[Finding]:
    """One JPEG through the DALI pipeline that training uses for raw first frames."""
    from importlib.util import find_spec

    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        advice = (
            'only data.condition = "raw" needs it: install the extra dali-cuda12 or dali-cuda13'
        )
        yield Finding("DALI", "skipped", "not installed", advice)
        return
    from nvidia.dali import fn, pipeline_def, types
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 40, 40)).save(file, "JPEG", quality=95)
    data = np.frombuffer(file.getvalue(), np.uint8)
    on_gpu = torch.cuda.is_available()

    @pipeline_def(batch_size=1, num_threads=1, device_id=0 if on_gpu else None)
    def decode():  # type: ignore[no-untyped-def]  # DALI's decorator decides what it returns
        encoded = fn.external_source(source=lambda: [data], batch=True)
        device = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=device, output_type=types.RGB)

    pipeline = decode()
    pipeline.build()
    (output,) = pipeline.run()
    output = output.as_cpu() if on_gpu else output
    red, green, blue = np.asarray(output.at(0)).mean((0, 1))
    right = abs(red - 200) < 3 and abs(green - 40) < 3 and abs(blue - 40) < 3
    yield Finding(
        "DALI",
        "ok" if right else "failure",
        f"one JPEG decoded on the {'GPU' if on_gpu else 'CPU'}: {red:.0f}, {green:.0f}, {blue:.0f}",
        "" if right else 'it should be 200, 40, 40: use data.condition = "latent"',
    )
