import argparse
import io
import os
import pathlib
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from engine.checkpoints import detect_format, read_checkpoint
from engine.errors import SSDKDError
from engine.hashing import sha256_of


def weights():
    """The state dict of a small network, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    return network.state_dict()


def assert_same(state, expected=None):
    expected = weights() if expected is None else expected
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def prefixed(prefix):
    return {prefix + name: value for name, value in weights().items()}


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        (weights(), {}),
        ({"state_dict": weights(), "epoch": 3}, {"epoch": 3}),
        ({"model": weights(), "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 4)}}}}, {}),
        ({"model_state_dict": weights(), "optimizer_state_dict": {"momentum": torch.ones(4, 4)}}, {}),
        ({"net": prefixed("module.")}, {}),
        ({"ema": {"state_dict": prefixed("_orig_mod.module.")}}, {}),
        (prefixed("module.model."), {}),
        (OrderedDict(prefixed("model.")), {}),
        ({"n_averaged": torch.tensor(3), **prefixed("module.")}, {}),
        ({"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(2)}}, {}),
        ({"params": prefixed("backbone.")}, {}),
        ({"checkpoint": {"anything": weights()}}, {}),
    ],
    ids=lambda value: None if isinstance(value, dict) and not value else "",
)
def test_weights_are_found_in_their_wrappers(tmp_path, content, metadata):
    torch.save(content, tmp_path / "teacher.pt")
    checkpoint = read_checkpoint(tmp_path / "teacher.pt")
    assert checkpoint.format == "state_dict"
    assert_same(checkpoint.weights.state)
    assert metadata.items() <= checkpoint.weights.metadata.items()


def test_the_averaged_network_is_preferred_and_said(tmp_path):
    averaged = {name: value + 1 for name, value in weights().items()}
    torch.save({"state_dict": weights(), "state_dict_ema": averaged}, tmp_path / "teacher.pt")
    found = read_checkpoint(tmp_path / "teacher.pt").weights
    assert_same(found.state, averaged)
    assert "'state_dict_ema' was taken, not 'state_dict'" in found.notes[0]


def test_a_prefix_stays_where_only_a_part_of_the_network_has_it(tmp_path):
    torch.save({"encoder.weight": torch.ones(3, 3), "head.weight": torch.ones(2, 3)}, tmp_path / "teacher.pt")
    assert list(read_checkpoint(tmp_path / "teacher.pt").weights.state) == ["encoder.weight", "head.weight"]


@pytest.mark.parametrize("name", ["teacher.pt", "teacher.onnx", "teacher"])
def test_the_content_decides_not_the_suffix(tmp_path, name):
    safetensors.torch.save_file(weights(), tmp_path / name, {"format": "pt", "ssdkd": '{"mean": [0.5], "std": [0.25]}'})
    checkpoint = read_checkpoint(tmp_path / name)
    assert (checkpoint.format, checkpoint.keeps_order) == ("safetensors", False)
    assert sorted(checkpoint.weights.state) == sorted(weights())
    assert checkpoint.weights.metadata == {"format": "pt", "mean": [0.5], "std": [0.25]}


def test_legacy_files_and_other_pickle_protocols(tmp_path):
    torch.save(weights(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "legacy.pth").weights.state)


def test_harmless_extras_load_without_trust(tmp_path):
    content = {
        "state_dict": weights(),
        "args": argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data/cifar"), arch="resnet20"),
        "best_acc": np.float64(91.25),
        "mean": np.array([0.5, 0.25, 0.125], np.float32),
        "history": defaultdict(list, loss=[np.float32(0.5)]),
    }
    torch.save(content, tmp_path / "teacher.pt")
    found = read_checkpoint(tmp_path / "teacher.pt").weights
    assert_same(found.state)
    assert found.metadata["arch"] == "resnet20"
    assert found.metadata["best_acc"] == 91.25
    assert found.metadata["mean"] == [0.5, 0.25, 0.125]


def test_a_frameworks_configuration_is_read_without_its_code(tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf")

    class DictConfig(dict):
        pass

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    module.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    torch.save({"state_dict": weights(), "hparams": DictConfig(lr=0.1)}, tmp_path / "teacher.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert_same(read_checkpoint(tmp_path / "teacher.ckpt").weights.state)


class RunsCode:
    """Unpickling one creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain", "protocol 4"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, writer):
    path, marker = tmp_path / "teacher.pt", tmp_path / "ran"
    content = {"state_dict": weights(), "extra": RunsCode(marker)}
    if writer == "plain":
        path.write_bytes(pickle.dumps(content))
    elif writer == "protocol 4":
        torch.save(content, path, pickle_protocol=4)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(SSDKDError) as caught:
        read_checkpoint(path)
    assert not marker.exists()
    assert "mkdir" in caught.value.message
    assert "--trust-pickle" in caught.value.hint


def test_a_pickled_network_needs_trust(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    torch.save({"model": nn.DataParallel(network), "epoch": 1}, tmp_path / "teacher.pt")
    with pytest.raises(SSDKDError, match=r"torch\.nn\.parallel\.data_parallel\.DataParallel"):
        read_checkpoint(tmp_path / "teacher.pt")
    checkpoint = read_checkpoint(tmp_path / "teacher.pt", trust_pickle=True)
    assert checkpoint.format == "pickle"
    assert isinstance(checkpoint.weights.module, nn.Sequential)
    assert_same(checkpoint.weights.module.state_dict(), network.state_dict())


def test_a_trusted_network_finds_the_users_own_package_called_engine(tmp_path, monkeypatch):
    package = tmp_path / "engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    program = (
        "import torch, engine.nets; torch.manual_seed(0); torch.save(engine.nets.Net(3, 2), 'teacher.pt');"
        "print(engine.nets.__file__)"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    module = read_checkpoint(tmp_path / "teacher.pt", trust_pickle=True).weights.module
    assert type(module).__name__ == "Net"
    assert "errors" in dir(sys.modules["engine"]), "ours must be back"


def zip_without_network():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
        (b"lr: 0.1\nepochs: 200\n", "is text, not a network"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
        (b"\x1f\x8b\x08\x00" + bytes(64), "gzip"),
        (b"\x00\xff\x13\x37" * 16, "no checkpoint that ssdkd knows: .* found bytes 00 ff 13 37"),
        (zip_without_network(), "zip archive without a network: .* found readme.txt"),
        (saved(weights())[:-200], "damaged or cut short"),
        (saved({"epoch": 3, "lr": 0.1}), "holds no network: .* a dictionary with epoch, lr"),
        (saved([1, 2]), "holds no network: .* found a list"),
        (safetensors.torch.save(weights())[:100], "damaged or cut short"),
        (b"\x08\x08garbage that is no protobuf\xff\xff", "damaged or cut short"),
    ],
)
def test_what_is_no_checkpoint_is_said_so(tmp_path, content, message):
    (tmp_path / "teacher.pt").write_bytes(content)
    with pytest.raises(SSDKDError, match=message) as caught:
        read_checkpoint(tmp_path / "teacher.pt")
    assert caught.value.hint


def test_a_truncated_legacy_file(tmp_path):
    torch.save(weights(), tmp_path / "teacher.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "teacher.pt").read_bytes()
    for size in (len(content) - 40, len(content) // 2, 40):
        (tmp_path / "teacher.pt").write_bytes(content[:size])
        with pytest.raises(SSDKDError, match="damaged or cut short"):
            read_checkpoint(tmp_path / "teacher.pt")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(("place", "count", "flip"), [(20, 40, 0x55), (None, 8, 0xFF), (-30, 10, 0xFF)])
def test_a_damaged_archive(tmp_path, place, count, flip, trust):
    """In its first header, in the numbers of a tensor, in the table of contents at its end."""
    content = bytearray(saved(weights()))
    if place is None:
        place = content.index(weights()["0.weight"].numpy().tobytes())
    for index in range(len(content))[place : place + count]:
        content[index] ^= flip
    (tmp_path / "teacher.pt").write_bytes(content)
    with pytest.raises(SSDKDError, match="is damaged or cut short") as caught:
        read_checkpoint(tmp_path / "teacher.pt", trust_pickle=trust)
    assert "checksum" in caught.value.hint


def test_an_archive_behind_a_pickle_is_not_looked_at(tmp_path):
    torch.save(weights(), tmp_path / "teacher.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "teacher.pt").open("ab") as file:
        file.write(zip_without_network())
    assert_same(read_checkpoint(tmp_path / "teacher.pt").weights.state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still in files
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "3.bias"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda value: value.to("meta"), "a shape without numbers, on the meta device"),
        (lambda value: value.to_sparse(), "sparse coo"),
        (lambda value: value.to(torch.complex64), r"complex \(complex64\)"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_tensors_that_are_no_dense_real_numbers(tmp_path, change, what, name, wrapped):
    state = weights()
    state[name] = change(state[name])
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "teacher.pt")
    with pytest.raises(SSDKDError, match=f"the tensor {name} in teacher.pt is {what}: expected dense") as caught:
        read_checkpoint(tmp_path / "teacher.pt")
    assert ".to_dense()" in caught.value.hint


def test_complex_safetensors(tmp_path):
    safetensors.torch.save_file({**weights(), "3.bias": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "teacher.st")
    with pytest.raises(SSDKDError, match=r"the tensor 3\.bias in teacher\.st is complex"):
        read_checkpoint(tmp_path / "teacher.st")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_tensor_beside_the_network_may_be_anything(tmp_path):
    content = {"state_dict": weights(), "mask": torch.ones(3).to_sparse(), "shape": torch.empty(3, device="meta")}
    content["scales"] = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    content["notes"] = "[" * 200_000
    torch.save(content, tmp_path / "teacher.pt")
    found = read_checkpoint(tmp_path / "teacher.pt").weights
    assert_same(found.state)
    assert (found.metadata["mask"], found.metadata["shape"], found.metadata["scales"]) == (None, None, None)
    assert found.metadata["notes"] == "[" * 200_000


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
    torch.save(weights(), tmp_path / "teacher.pt")
    with zipfile.ZipFile(tmp_path / "teacher.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("teacher/data/bomb", bytes(65_000_000))
    with pytest.raises(
        SSDKDError, match=r"teacher\.pt would unpack to 65,\d+,\d+ bytes from \d+,?\d+: expected weights"
    ):
        read_checkpoint(tmp_path / "teacher.pt")


def test_what_is_missing_or_none_may_be_a_students_weights_as_well(tmp_path):
    (tmp_path / "text.pt").write_text("hello\n")
    for name, message in (("nowhere.pt", "there is no file"), ("text.pt", "is text")):
        with pytest.raises(SSDKDError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert "teacher" not in caught.value.hint


def test_formats_and_hashes(tmp_path):
    torch.save(weights(), tmp_path / "a")
    assert detect_format(tmp_path / "a") == "zip"
    (tmp_path / "b").write_bytes(b"abc")
    assert sha256_of(tmp_path / "b") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
