"""What files are to be made: formats and precisions, from what was typed, the device profile, and this machine."""

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from engine.errors import SSDKDError
from exporters import FORMATS, PRECISIONS
from exporters.precision import Scheme
from exporters.to_tensorrt import Flavour, find_flavour
from profiles import GENERIC, DeviceProfile, load_profile
from ssdkd_cli.environment import cpu_timings_count, is_this_machine

TENSORRT_PROFILES = {"tensorrt": "datacenter-gpu", "tensorrt_rtx": "rtx"}  # where none is named


@dataclass(frozen=True)
class Target:
    """Files to make. `asked`: precisions that were asked for; a file of theirs that fails its proof fails the run.

    `tried`: further ones, to compare with; one that fails is left out with a word. `fallback`: the layers that lose
    most may stay in float32 in an INT8 file.
    """

    profile: DeviceProfile
    is_named: bool  # the profile was named by the user
    formats: tuple[str, ...]
    asked: tuple[str, ...]
    tried: tuple[str, ...]
    qat: str  # "auto", "on", "off"
    fallback: bool
    flavour: Flavour | None  # of TensorRT, where a plan is built here
    half_io: bool = False  # inputs and outputs of an FP16 file in float16 too
    with_float32: bool = True  # made beside the others, which are made of it and compared with it

    @property
    def precisions(self) -> tuple[str, ...]:
        """All that are made as ONNX files, float32 first."""
        beside = ("fp32",) if self.with_float32 else ()
        return tuple(name for name in PRECISIONS if name in (*beside, *self.asked, *self.tried))

    @property
    def batches(self) -> tuple[int, int, int]:
        """The smallest, usual and largest batch of a TensorRT plan."""
        batches = self.profile.batches
        return batches.smallest, batches.usual, batches.largest

    @property
    def timed_batch(self) -> int | None:
        """The batch of the throughput: that of a profile that was named; None: as large as suits the machine."""
        return self.profile.batches.usual if self.is_named else None

    @property
    def is_this_machine(self) -> bool:
        """Whether this machine is of the device's kind: what is timed on another says nothing of it."""
        return is_this_machine(self.profile)

    @property
    def cpu_timings_count(self) -> bool:
        """Whether the latency of a file on this machine's processor says something of the device."""
        return cpu_timings_count(self.profile)

    @property
    def latency_budget_ms(self) -> float | None:
        """The budget of a profile that was named, where this machine is of its kind; None: there is no such limit."""
        is_known = self.is_named and self.profile.machine is not None
        return self.profile.latency_budget_ms if is_known and self.cpu_timings_count else None

    @property
    def scheme(self) -> Scheme:
        """How the device wants its integers."""
        return Scheme(**asdict(self.profile.quantization))


def resolve_target(
    *,
    formats: Sequence[str],
    precisions: Sequence[str],
    profile: str | None,
    qat: str,
    fallback: bool,
    half_io: bool = False,
) -> Target:
    """What was typed wins over the profile; without either it is float32 ONNX, with FP16 and INT8 beside it to compare.

    Raises:
        SSDKDError: a profile that does not exist, a format, precision and profile that do not go together, or that need
            a package which is not installed.
    """
    check_packages(formats)
    flavour: Flavour | None = None
    if "trt" in formats and profile is None:
        flavour = _flavour_for_this_machine()
        device = load_profile(TENSORRT_PROFILES[flavour.name])
    else:
        device = load_profile(GENERIC if profile is None else profile)
    chosen = tuple(formats) or device.export
    check_packages(chosen)
    if "trt" in chosen and device.runtime == "onnxruntime":
        raise SSDKDError(
            f"--export trt: the profile {device.name} is of a device without TensorRT",
            "name one that has it, for example --profile rtx; `ssdkd profiles` lists them",
        )
    if "trt" in chosen and not device.built_on_device and flavour is None:
        flavour = find_flavour(device.runtime)
    asked = tuple(precisions) or ((device.precision,) if profile is not None or flavour else ())
    for name in asked:
        if name not in device.precisions:
            raise SSDKDError(
                f"--precision {name}: the profile {device.name} runs {', '.join(device.precisions)}",
                f"use --precision {device.precision}, or another --profile: `ssdkd profiles`",
            )
    compared = not precisions and device.runtime == "onnxruntime"
    tried = tuple(name for name in device.precisions if compared and name not in asked)
    for flag, given, name in (
        ("--qat on", qat == "on", "int8"),
        ("--no-fallback", not fallback, "int8"),
        ("--fp16-io", half_io, "fp16"),
    ):
        if given and name not in asked:
            raise SSDKDError(
                f"{flag} is for an {name.upper()} file, and none is asked for",
                f"add --precision {name}, or leave {flag} out",
            )
    return Target(device, profile is not None, chosen, asked, tried, qat, fallback, flavour, half_io)


def is_for_another_device(profile: str | None) -> bool:
    """Whether this processor says nothing of files for a profile of that name, as of one that is not known here."""
    if profile is None:
        return False
    try:
        return not cpu_timings_count(load_profile(profile))
    except SSDKDError:
        return True


def check_packages(formats: Sequence[str]) -> None:
    """Raises SSDKDError for a format whose packages are not installed."""
    for name in formats:
        missing = [package for package in FORMATS[name].requires if importlib.util.find_spec(package) is None]
        if missing:
            raise SSDKDError(f"--export {name} needs {', '.join(missing)}", f"pip install {' '.join(missing)}")


def _flavour_for_this_machine() -> Flavour:
    """TensorRT where there is a GPU, which it needs to build; else, and where it is not installed, that for RTX."""
    import torch

    if not torch.cuda.is_available():
        with contextlib.suppress(SSDKDError):
            return find_flavour("tensorrt_rtx")
    return find_flavour()
