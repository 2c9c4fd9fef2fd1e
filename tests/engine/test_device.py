import pytest
import torch

from engine import device as device_module
from engine.device import Compute, choose_device, cpu_computes_bfloat16
from engine.errors import SSDKDError

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """PyTorch as it looks on a machine with two GPUs that know bfloat16; nothing is computed there.

    Returns the GPUs that became the current one, in order.
    """
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    return current


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_cpu_uses_bfloat16_only_where_the_processor_has_it(
    native: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "cpu_computes_bfloat16", lambda: native)
    assert choose_device("cpu") == Compute(CPU, dtype)


@pytest.mark.parametrize(("said", "numbers"), [(None, [3, 1]), ("true", [3, 1]), ("false", [1]), ("FALSE", [1])])
def test_a_cpu_has_threads_to_choose_unless_the_environment_says_no(
    said: str | None, numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_DYNAMIC", said)
    assert choose_device("cpu").threads.numbers == numbers


@pytest.mark.usefixtures("two_gpus")
def test_beside_a_gpu_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    assert choose_device("cuda:1").threads.numbers == [1]


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (True, True), (False, False)])
def test_either_instruction_set_is_enough_for_bfloat16(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert cpu_computes_bfloat16() is (amx or avx512)


def test_a_pytorch_without_the_probes_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert cpu_computes_bfloat16() is False


def test_autocast_sets_the_type_of_products_and_ends_with_the_context() -> None:
    matrix = torch.ones(2, 2)
    with Compute(CPU, torch.bfloat16).autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    assert (matrix @ matrix).dtype == torch.float32
    with Compute(CPU, None).autocast():
        assert (matrix @ matrix).dtype == torch.float32


def test_describe_says_device_and_precision() -> None:
    assert Compute(CPU, None).describe() == "cpu, float32"
    assert Compute(CPU, torch.bfloat16).describe() == "cpu, bfloat16"


@pytest.mark.usefixtures("two_gpus")
def test_describe_names_the_gpu() -> None:
    assert choose_device("cuda:1").describe() == "cuda:1 (Test GPU), bfloat16"


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert choose_device("auto").device == CPU


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_gpus_are_chosen_by_name(name: str, index: int, two_gpus: list[int]) -> None:
    assert choose_device(name) == Compute(torch.device("cuda", index), torch.bfloat16)
    assert two_gpus == [index]  # which TensorRT takes


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device == 0 else (7, 5))
    assert choose_device("cuda:0").autocast_dtype == torch.bfloat16
    assert choose_device("cuda:1").autocast_dtype is None


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_beyond_the_last_one() -> None:
    with pytest.raises(SSDKDError, match=r"cuda:2 was asked for, but this machine has 2 CUDA GPU") as caught:
        choose_device("cuda:2")
    assert "cuda:0" in caught.value.hint


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(name: str) -> None:
    with pytest.raises(SSDKDError, match=f"--device {name} was asked for, but PyTorch finds no CUDA GPU") as caught:
        choose_device(name)
    assert "--device cpu" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "'gpu' is not a device"), ("", "is not a device"), ("mps", "'mps' is not supported")]
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(SSDKDError, match=message) as caught:
        choose_device(name)
    assert "--device" in caught.value.hint
