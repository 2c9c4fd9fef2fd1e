import copy
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError
from exporters.files import write_atomically
from exporters.runtimes import open_runtime, predictor
from exporters.to_onnx import OPSET, WithPreprocessing, write_onnx

SHAPE = (3, 8, 8)


class Odd(nn.Module):
    """A linear network whose forward is given."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 4)
        self.given = forward

    def forward(self, images: Tensor) -> object:
        return self.given(self.linear, images)


def branching(linear: nn.Module, images: Tensor) -> Tensor:
    logits = linear(images.flatten(1))
    return logits if logits.sum() > 0 else -logits


def talking(linear: nn.Module, images: Tensor) -> Tensor:
    print("a print of the user's own")
    logging.getLogger("user").error("and a log line")
    return linear(images.flatten(1))


def failing(linear: nn.Module, images: Tensor) -> Tensor:
    raise ValueError("seven is not eight")


def test_file_is_one_self_contained_named_opset_18_graph(exported: Path) -> None:
    model = onnx.load(exported, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.name for entry in exported.parent.iterdir()] == ["model.onnx"]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert ([value.name for value in model.graph.input], [value.name for value in model.graph.output]) == (
        ["images"],
        ["logits"],
    )
    assert exported.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_gives_the_logits_of_the_module(exported: Path, network: nn.Module, batch: int) -> None:
    images = np.random.default_rng(batch).standard_normal((batch, *SHAPE), dtype=np.float32)
    np.testing.assert_allclose(open_runtime(exported).run(images), predictor(network)(images), rtol=1e-4, atol=1e-5)


def test_file_tells_nothing_of_the_machine_that_wrote_it(exported: Path) -> None:
    content = exported.read_bytes()
    for word in (b"site-packages", b".py", b"torch", b"TinyNetwork", str(Path.cwd()).encode()):
        assert word not in content


def test_same_network_gives_the_same_bytes(exported: Path, network: nn.Module, tmp_path: Path) -> None:
    stored = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    write_onnx(network, tmp_path / "again.onnx", input_shape=SHAPE, metadata=stored)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def test_module_and_process_are_left_as_they_were(network: nn.Module, tmp_path: Path) -> None:
    module = copy.deepcopy(network).to(torch.float64).train()
    module.features[1].eval()
    before, flags = copy.deepcopy(module.state_dict()), [child.training for child in module.modules()]
    random_state, disabled = torch.get_rng_state(), logging.root.manager.disable

    write_onnx(module, tmp_path / "model.onnx", input_shape=SHAPE, metadata={})

    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert [child.training for child in module.modules()] == flags
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert logging.root.manager.disable == disabled


def test_exporting_says_nothing(network: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_onnx(network, tmp_path / "model.onnx", input_shape=SHAPE, metadata={})
    write_onnx(Odd(talking), tmp_path / "talking.onnx", input_shape=SHAPE, metadata={})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branching, "data-dependent"),
        (failing, "seven is not eight"),
        (lambda linear, images: linear(images.view(2, -1)), "one batch size only (images: 2)"),
        (lambda linear, images: (linear(images.flatten(1)), images.mean((1, 2, 3))), "found 1 and 2"),
        (lambda linear, images: torch.linalg.eigvals(images[:, 0]).real, "linalg_eig"),
        (lambda linear, images: linear(images[:, :1].flatten(1)), "same reduction dim"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    forward: Callable[[nn.Module, Tensor], object], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SSDKDError, match="Odd cannot be exported to ONNX") as caught:
        write_onnx(Odd(forward), tmp_path / "model.onnx", input_shape=SHAPE, metadata={})
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert "torch.export" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused_with_what_to_type(network: nn.Module, tmp_path: Path) -> None:
    scripted = torch.jit.trace(network, torch.zeros(2, *SHAPE))
    with pytest.raises(SSDKDError, match="TorchScript") as caught:
        write_onnx(scripted, tmp_path / "model.onnx", input_shape=SHAPE, metadata={})
    assert "--arch" in caught.value.hint


def test_program_of_torch_export_can_be_exported(network: nn.Module, tmp_path: Path) -> None:
    images = torch.randn(2, *SHAPE)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    write_onnx(program.module(), tmp_path / "model.onnx", input_shape=SHAPE, metadata={})
    logits = open_runtime(tmp_path / "model.onnx").run(images.numpy())
    np.testing.assert_allclose(logits, predictor(network)(images.numpy()), rtol=1e-4, atol=1e-5)


def test_network_too_large_for_one_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        giant = nn.Linear(30_000, 30_000)
    with pytest.raises(SSDKDError, match=r"Linear has 3\.6 GB"):
        write_onnx(giant, tmp_path / "model.onnx", input_shape=SHAPE, metadata={})


def test_preprocessing_in_front_takes_images_in_unit_range(network: nn.Module) -> None:
    images = torch.rand(4, *SHAPE)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.3])
    with torch.no_grad():
        expected = network((images - mean[:, None, None]) / std[:, None, None])
        actual = WithPreprocessing(network, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))(images)
    torch.testing.assert_close(actual, expected)


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("exporters.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_missing_folder_is_an_os_error(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_onnx(network, tmp_path / "nowhere" / "model.onnx", input_shape=SHAPE, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_module_on_a_gpu_stays_there(network: nn.Module, exported: Path, tmp_path: Path) -> None:
    module = copy.deepcopy(network).cuda()
    stored = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    write_onnx(module, tmp_path / "model.onnx", input_shape=SHAPE, metadata=stored)
    assert {parameter.device.type for parameter in module.parameters()} == {"cuda"}
    assert (tmp_path / "model.onnx").read_bytes() == exported.read_bytes()
