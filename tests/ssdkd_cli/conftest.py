import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from engine.zoo import ZOO
from exporters import to_onnx
from ssdkd_cli import timing
from ssdkd_cli.main import main

CLASSES = 4
CONFIG = """
[compress]
input = "1x16x16"
mean = 0.5
std = 0.5
batch-size = 16
device = "cpu"
precision = ["fp32"]

[distillation]
rounds = 3
warmup_rounds = 1
samples = 64
generator_width = 8
student_steps = 2
"""


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Ran:
    """A command in this process, through the same main() as the console script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def _short_benchmarks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BENCH_SECONDS", 0.02)
        yield


@pytest.fixture(scope="session", autouse=True)
def _each_network_is_exported_once() -> Any:
    """The exporter took half of the time: runs that are alike make the same student. It is tried in tests/exporters."""
    export, known = to_onnx._to_proto, dict[object, bytes]()

    def once(module: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
        digest = hashlib.sha256()
        for tensor in (*module.parameters(), *module.buffers()):
            digest.update(tensor.detach().cpu().numpy().tobytes())
        key = tuple(type(part) for part in module.modules()), repr(module), input_shape, digest.digest()
        if key not in known:
            known[key] = export(module, input_shape).SerializeToString()
        return onnx.ModelProto.FromString(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "_to_proto", once)
        yield


@pytest.fixture
def ssdkd() -> Callable[..., Ran]:
    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher.pt (a small network whose BatchNorm has seen data), ssdkd.toml, labels.txt and test.npz."""
    folder = tmp_path_factory.mktemp("shared")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ZOO["resnet8"](CLASSES, 1).train()
        with torch.no_grad():
            for _ in range(20):
                network(torch.randn(32, 1, 16, 16))
    torch.save(network.state_dict(), folder / "teacher.pt")
    (folder / "ssdkd.toml").write_text(CONFIG)
    (folder / "labels.txt").write_text("apple\nbird\ncat\ndog\n")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16), dtype=np.uint8)
    np.savez(folder / "test.npz", images=images, labels=np.arange(20) % CLASSES)
    return folder


@pytest.fixture(scope="session")
def compressed(shared: Path) -> Path:
    """The folder of a finished run; tests that change it copy it first."""
    folder = shared / "run"
    ran = run(
        *("compress", shared / "teacher.pt", "--student", "resnet8", "--config", shared / "ssdkd.toml"),
        *("--classes", shared / "labels.txt", "--eval-data", shared / "test.npz", "--out", folder),
    )
    assert ran.code == 0, ran.err
    return folder
