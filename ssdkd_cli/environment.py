"""What this machine is and has, for `ssdkd doctor` and for report.json."""

import importlib
import importlib.metadata
import platform
from pathlib import Path

from engine.errors import SSDKDError
from engine.processors import available_threads
from exporters.tensorrt_sidecar import FLAVOURS
from profiles import DeviceProfile
from ssdkd_cli import __version__

PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "safetensors")

ABSENT, BROKEN = "not installed", "cannot be imported: "
CPU_INFO = Path("/proc/cpuinfo")
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}  # as Windows and macOS call what Linux calls so
# Profile, the flags in CPU_INFO of which one must be there, and what they mean; the first that fits is the machine's.
CPU_PROFILES = (
    ("x86-vnni", {"avx512_vnni", "avx_vnni"}, "VNNI"),
    ("x86-avx2", {"avx2"}, "AVX2, no VNNI"),
    ("arm64", {"asimddp"}, "ARM with dot products"),
)


def cpu_name() -> str:
    """'Intel(R) Xeon(R) ..., 2 cores', from where the system says it."""
    name = platform.processor() or platform.machine()
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name: the architecture will do
    return f"{name}, {available_threads()} cores"


def cpu_profile() -> tuple[str, str] | None:
    """The device profile that this processor fits, and why; None where none is known to fit."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return next(((name, why) for name, one_of, why in CPU_PROFILES if flags & one_of), None)


def profile_warnings(profile: str) -> list[str]:
    """A sentence where files for a processor with VNNI are timed on one without."""
    if profile != "x86-vnni" or (cpu_profile() or ("",))[0] != "x86-avx2":
        return []
    return [
        "this processor has no VNNI: what is timed here for --profile x86-vnni says little of one that has; "
        "--profile x86-avx2 fits this machine"
    ]


def is_this_machine(profile: DeviceProfile) -> bool:
    """Whether this processor is of the kind that a device profile names, or it names none."""
    machine = platform.machine()
    return profile.machine in (None, MACHINES.get(machine, machine)) and not profile_warnings(profile.name)


def cpu_timings_count(profile: DeviceProfile) -> bool:
    """Whether the latency of a file on this processor says something of the profile's device."""
    return profile.runtime == "onnxruntime" and is_this_machine(profile)


def gpu_names() -> list[str]:
    """The CUDA GPUs that PyTorch finds, with their memory."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}" for gpu in found
    ]


def doctor_facts() -> dict[str, str]:
    """What `ssdkd doctor` shows, in its order."""
    import torch

    from engine.device import cpu_computes_bfloat16

    facts = {
        "ssdkd": __version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cpu_precision": "bfloat16 natively" if cpu_computes_bfloat16() else "float32 (no native bfloat16)",
        "gpu": "; ".join(gpu_names()) or "none that PyTorch can use",
        "cuda": torch.version.cuda or "PyTorch was built without it",
    }
    facts |= {package: _version_of(package) for package in PACKAGES}
    facts["onnxruntime_providers"] = _providers()
    facts |= {package: _import_of(package) for package in FLAVOURS}
    return facts


def doctor_findings() -> list[str]:
    """What this machine can and cannot do, one sentence each."""
    import torch

    from engine.device import cpu_computes_bfloat16

    findings = []
    if torch.cuda.is_available():
        findings.append("distils on the GPU: --device auto takes it")
    else:
        findings.append("distils on the CPU; a CUDA GPU is many times faster")
        if torch.version.cuda and Path("/proc/driver/nvidia").exists():
            findings.append("an NVIDIA driver is here but PyTorch cannot use it: compare the driver with CUDA above")
        if not cpu_computes_bfloat16():
            findings.append("computes in float32: this processor has no native bfloat16")
    if fitting := cpu_profile():
        findings.append(f"its processor fits --profile {fitting[0]} ({fitting[1]})")
    needed = ("onnx", "onnxscript", "onnxruntime")
    if damaged := [package for package in needed if _import_of(package).startswith((ABSENT, BROKEN))]:
        return [*findings, f"exports nothing: {' and '.join(damaged)} cannot be imported; install ssdkd once more"]
    findings.append("exports to ONNX, and proves and measures the file in ONNX Runtime on the CPU")
    return [*findings, *_plan_findings()]


def _providers() -> str:
    try:
        import onnxruntime

        return ", ".join(onnxruntime.get_available_providers())
    except Exception as error:  # it is not whole
        return f"{BROKEN}{error or type(error).__name__}"


def _plan_findings() -> list[str]:
    """What becomes of TensorRT plans here, a sentence for each library that is there."""
    from exporters.tensorrt_runtime import why_plans_do_not_run
    from exporters.to_tensorrt import check_builder, find_flavour

    findings = []
    for name in FLAVOURS:
        if _import_of(name) == ABSENT:
            continue
        try:
            flavour = find_flavour(name)
            check_builder(flavour)
        except SSDKDError as error:
            findings.append(f"{error.message}: {error.hint}")
            continue
        why = why_plans_do_not_run(flavour)
        outcome = f"and cannot run them: {why}" if why else "and proves and measures them on the GPU"
        findings.append(f"builds plans of {flavour.label}, {outcome}")
    return findings


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # another distribution may have brought it, as onnxruntime-gpu does
        return _import_of(package)


def _import_of(package: str) -> str:
    try:
        return str(getattr(importlib.import_module(package), "__version__", "installed"))
    except ModuleNotFoundError:
        return ABSENT
    except Exception as error:  # installed, but its libraries are not, or it is damaged
        return f"{BROKEN}{error or type(error).__name__}"
