"""What was typed of a network, where its file does not say it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdkd_cli.labels import read_classes

OF_A_FILE = ("arch", "input", "mean", "std")  # a run knows its own


@dataclass(frozen=True)
class Stated:
    """The options of a teacher as they were typed; `input` is C, H, W, `classes` a number or a labels file."""

    arch: str | None
    input: tuple[int, int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: int | Path | None
    trust_pickle: bool

    @property
    def flags(self) -> str:
        """Those that describe a single file, '--arch --input'; '' where there is none."""
        return " ".join(f"--{name}" for name in OF_A_FILE if getattr(self, name) is not None)

    def arguments(self) -> dict[str, Any]:
        """As engine.teacher.load_teacher takes them. Raises SSDKDError as `read_classes` does."""
        number, names = read_classes(self.classes)
        return {
            "arch": self.arch,
            "input_shape": self.input,
            "mean": self.mean,
            "std": self.std,
            "classes": number,
            "class_names": names,
            "classes_file": self.classes if names else None,
            "trust_pickle": self.trust_pickle,
        }
