import dataclasses
import importlib
import importlib.util
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import SSDKDError
from exporters.runtimes import open_runtime
from exporters.tensorrt_runtime import open_plan, time_plan, why_plans_do_not_run
from exporters.tensorrt_sidecar import read_sidecar, sidecar_path, write_sidecar
from exporters.to_tensorrt import Flavour, build_plan, find_flavour

HAS_PACKAGE = (sys.platform, platform.machine()) == ("linux", "x86_64") or importlib.util.find_spec("tensorrt_rtx")
pytestmark = pytest.mark.skipif(
    not HAS_PACKAGE, reason="TensorRT for RTX is not installed: no package for this platform"
)


def built(graph: Path, folder: Path, flavour: Flavour, batches: tuple[int, int, int] = (1, 4, 8)) -> Path:
    path = folder / "model.engine"
    build_plan(graph, path, precision="fp32", batches=batches, workspace_mb=64, timing_cache=None, flavour=flavour)
    return path


@pytest.fixture
def plan(exported: Path, tmp_path: Path) -> Path:
    """A plan of TensorRT for RTX."""
    return built(exported, tmp_path, find_flavour("tensorrt_rtx"))


def describe_as(plan: Path, **changes: object) -> None:
    write_sidecar(plan, dataclasses.replace(read_sidecar(plan), **changes))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_machine_without_a_gpu(plan: Path, no_gpu: None) -> None:
    for use in (open_plan, lambda path: time_plan(path, 1, cuda_graph=False)):
        with pytest.raises(SSDKDError, match=r"model\.engine runs on an NVIDIA GPU: PyTorch .* finds none") as caught:
            use(plan)
        assert "with a GPU and its driver" in caught.value.hint


def test_plans_do_not_run_without_a_gpu(no_gpu: None) -> None:
    assert why_plans_do_not_run(find_flavour("tensorrt_rtx")) == "there is no NVIDIA GPU"


@pytest.mark.parametrize("fails", ["Builder", "build_serialized_network"])
def test_plans_do_not_run_where_the_library_cannot_build(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = find_flavour("tensorrt_rtx")
    trt = importlib.import_module(flavour.name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def none(_logger: object) -> None:
        raise TypeError("factory function returned nullptr")

    if fails == "Builder":
        monkeypatch.setattr(trt, "Builder", none)
    else:
        monkeypatch.setattr(trt.Builder, fails, lambda *_: None)
    assert (why_plans_do_not_run(flavour) or "").startswith(f"TensorRT for RTX {flavour.version} cannot build here")


def test_plan_of_another_version(plan: Path, no_gpu: None) -> None:
    here = find_flavour("tensorrt_rtx").version
    describe_as(plan, version="1.4.0.76")
    with pytest.raises(SSDKDError, match=rf"was built by TensorRT for RTX 1\.4\.0\.76, here is {here}") as caught:
        open_plan(plan)
    assert caught.value.hint == "build it here: ssdkd export RUN --export trt, or install 1.4.0.76"


def test_plan_of_a_library_that_is_not_here(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not there
    describe_as(plan, flavour="tensorrt", version="10.3.0")
    with pytest.raises(SSDKDError, match="TensorRT is not installed") as caught:
        open_plan(plan)
    assert caught.value.hint == "pip install 'tensorrt>=10,<12'"


def test_plan_for_another_gpu(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module("tensorrt_rtx"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    describe_as(plan, flavour="tensorrt", compute_capability="8.7", gpu="Orin")
    with pytest.raises(
        SSDKDError, match=r"was built for compute capability 8\.7 \(Orin\), this GPU has 9\.0 \(NVIDIA H100\)"
    ):
        open_plan(plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the plan loads")
def test_library_that_cannot_load_says_why(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU that is not there")
    with pytest.raises(SSDKDError, match=r"cannot be loaded by .* on a GPU that is not there: .*CUDA"):
        open_plan(plan)
    why = why_plans_do_not_run(find_flavour("tensorrt_rtx"))
    assert re.match(r"a plan cannot be loaded by TensorRT for RTX .* on a GPU that is not there: .*CUDA", why or "")
    assert capfd.readouterr() == ("", "")


def test_damaged_plan_and_missing_sidecar(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(SSDKDError, match="is not the plan that its sidecar describes"):
        open_plan(plan)
    sidecar_path(plan).unlink()
    with pytest.raises(SSDKDError, match="has no sidecar"):
        open_plan(plan)


# What follows has not run yet: it takes a GPU that the library has kernels for.


def library_for_this_gpu() -> Flavour:
    """The library for plans on this GPU; skips where there is none, or none that runs on that one."""
    try:
        flavour = find_flavour()
    except SSDKDError as error:
        pytest.skip(error.message)
    if why := why_plans_do_not_run(flavour):
        pytest.skip(why)
    return flavour


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("count", [1, 7, 8, 50])
def test_plan_gives_the_logits_of_its_onnx_file(count: int, exported: Path, tmp_path: Path) -> None:
    runtime = open_plan(built(exported, tmp_path, library_for_this_gpu(), (2, 4, 8)))
    reference = open_runtime(exported)
    assert (runtime.input_shape, runtime.classes, runtime.fixed_batch) == ((3, 8, 8), 5, None)
    assert runtime.metadata == reference.metadata
    images = np.random.default_rng(count).standard_normal((count, 3, 8, 8), dtype=np.float32)
    np.testing.assert_allclose(runtime.run(images), reference.run(images), rtol=1e-3, atol=1e-4)
    with pytest.raises(SSDKDError, match="cannot run on images of shape"):
        runtime.run(np.zeros((4, 3, 9, 9), dtype=np.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_plan_is_timed(cuda_graph: bool, exported: Path, tmp_path: Path) -> None:
    plan = built(exported, tmp_path, library_for_this_gpu())
    latency = time_plan(plan, 8, cuda_graph=cuda_graph, min_seconds=0.2)
    assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p99_ms
    assert 0 < latency.throughput_per_s <= 1.1 * 8000 / latency.p50_ms
    assert latency.batch == 8
    assert latency.runtime.endswith("CUDA graph") == cuda_graph
    with pytest.raises(SSDKDError, match="takes batches of 1 to 8, asked for 9"):
        time_plan(plan, 9, cuda_graph=cuda_graph)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_engine_is_asked_for_its_types(exported: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(built(exported, tmp_path, library_for_this_gpu()))
    assert sidecar.compute_capability == ".".join(map(str, torch.cuda.get_device_capability()))
    assert sidecar.engine_tensors is None or sidecar.engine_tensors["fp32"] > 0
