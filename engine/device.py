"""Where a run computes: the device, its precision and its threads."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from engine.depthwise import QuickDepthwise
from engine.errors import SSDKDError
from engine.threads import Threads

# First compute capability (Ampere) that multiplies bfloat16; older GPUs emulate it, slower than float32.
NATIVE_BFLOAT16 = 8
LARGEST_BATCHES = {"cpu": 64, "cuda": 256}
BATCHES_AT_ONCE = 8  # of a GPU in a forward pass that keeps no gradients; not measured


@dataclass(frozen=True)
class Compute:
    """A device, the type that matrix products and convolutions use on it (`None`: plain float32), and its threads."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    threads: Threads = field(default_factory=lambda: Threads(1), compare=False)  # of which nothing is chosen

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """A context in which eligible operations run in `autocast_dtype`."""
        with contextlib.ExitStack() as contexts:
            if self.autocast_dtype is not None:
                contexts.enter_context(torch.autocast(self.device.type, dtype=self.autocast_dtype))
                if self.device.type == "cpu" and torch.is_grad_enabled():
                    contexts.enter_context(QuickDepthwise())
            yield

    @property
    def has_graphs(self) -> bool:
        """Whether the device can record work and repeat it (engine.recording)."""
        return self.device.type == "cuda"

    @property
    def freezes_batchnorm(self) -> bool:
        """Whether BatchNorm layers in eval mode are worth a gradient of our own: a CPU takes up to a tenth longer."""
        return self.device.type == "cuda"

    @property
    def largest_batch(self) -> int:
        """Images of a step that teaches or inverts: on an H200 256 take about twice as long as 64."""
        return LARGEST_BATCHES[self.device.type]

    @property
    def memory_bytes(self) -> float:
        """All memory that the device has, in use or not; infinity where the system does not say."""
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, ValueError, OSError):  # Windows
            return math.inf

    def at_once(self, batch: int) -> int:
        """Images of a forward pass without gradients, where one with them has `batch`: a GPU wants as many as fit.

        A CPU that gets more at once than its caches hold takes twice as long (docs/experiments.md).
        """
        return batch * BATCHES_AT_ONCE if self.device.type == "cuda" else batch

    def describe(self) -> str:
        """`cpu, bfloat16` or `cuda:0 (NVIDIA H100), bfloat16`."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        precision = str(self.autocast_dtype or torch.float32).removeprefix("torch.")
        return f"{self.device}{name}, {precision}"


def choose_device(name: str) -> Compute:
    """The `Compute` for `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes the first GPU, else the CPU.

    A GPU becomes the process's current one, which TensorRT takes.
    Beside other work a CPU's threads become fewer, unless the environment says OMP_DYNAMIC=false.

    Raises:
        SSDKDError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SSDKDError(f"'{name}' is not a device", "use --device auto, cpu, cuda or cuda:1") from None
    if device.type == "cpu":
        most = 1 if os.environ.get("OMP_DYNAMIC", "").lower() == "false" else torch.get_num_threads()
        return Compute(device, torch.bfloat16 if cpu_computes_bfloat16() else None, Threads(most))
    if device.type != "cuda":
        raise SSDKDError(f"device '{name}' is not supported: expected a CPU or a CUDA GPU", "use --device cpu or cuda")
    if not torch.cuda.is_available():
        raise SSDKDError(
            f"--device {name} was asked for, but PyTorch finds no CUDA GPU on this machine",
            "run with --device cpu, or see `ssdkd doctor` for what is missing",
        )
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise SSDKDError(
            f"--device {name} was asked for, but this machine has {torch.cuda.device_count()} CUDA GPU(s)",
            "run with --device cuda:0",
        )
    torch.cuda.set_device(index)
    major, _ = torch.cuda.get_device_capability(index)
    return Compute(torch.device("cuda", index), torch.bfloat16 if major >= NATIVE_BFLOAT16 else None)


def cpu_computes_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively; emulated bfloat16 is slower than float32."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private names: absent means no
    return any(probe() for name in probes if (probe := getattr(torch.cpu, name, None)) is not None)
