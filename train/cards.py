"""What the GPU of this process is doing, as NVML tells it: no torch, no wait for the device."""

from typing import NamedTuple, Self

import torch


class CardState(NamedTuple):
    """Now, or for utilisation the last second or so; None where the card does not tell."""

    # share of the time in which some kernel ran
    utilisation: float | None
    power_w: float | None
    temperature_c: float | None
    # of the multiprocessors
    clock_mhz: float | None
    # taken on the card by all processes
    memory_gib: float | None


NOT_MEASURED = CardState(None, None, None, None, None)


class CardReader:
    """One card, by the UUID that torch knows: NVML counts cards that CUDA_VISIBLE_DEVICES hides."""

    def __init__(self, uuid: str):
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    @classmethod
    def open(cls, device: torch.device) -> Self | None:
        """None for a CPU, and without NVML (a container without the driver's tools)."""
        if device.type != "cuda":
            return None
        import pynvml

        try:
            return cls(str(torch.cuda.get_device_properties(device).uuid))
        except pynvml.NVMLError:
            return None

    def read(self) -> CardState:
        nvml, handle = self._nvml, self._handle

        def ask(question: str, *arguments: int) -> float | None:
            try:
                return float(getattr(nvml, question)(handle, *arguments))
            except nvml.NVMLError:
                return None

        utilisation = memory_bytes = None
        try:
            utilisation = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            memory_bytes = nvml.nvmlDeviceGetMemoryInfo(handle).used
        except nvml.NVMLError:
            pass
        power_mw = ask("nvmlDeviceGetPowerUsage")
        return CardState(
            utilisation=utilisation,
            power_w=None if power_mw is None else power_mw / 1000,
            temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_gib=None if memory_bytes is None else memory_bytes / 2**30,
        )
