"""A verifier that never fails proves nothing: every way to break a file here must be found, and named."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from exporters import verify as verifier
from exporters.metadata import PREFIX, metadata_for
from exporters.precision import Scheme, to_fp16, to_int8
from exporters.runtimes import open_runtime, predictor, to_input
from exporters.to_onnx import WithPreprocessing, write_onnx
from exporters.verify import Verification, verify

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SHAPE = (3, 8, 8)
Samples = NDArray[np.uint8]


def check(network: nn.Module, path: Path, samples: Samples) -> Verification:
    return verify(network, path, samples, mean=MEAN, std=STD)


def change(model: ModelProto, suffix: str, changed: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(suffix))
    tensor.CopyFrom(numpy_helper.from_array(changed(numpy_helper.to_array(tensor).copy()), tensor.name))


def state(model: ModelProto, name: str, value: str) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == PREFIX + name)
    entry.value = value


def perturb_weights(model: ModelProto) -> None:
    rng = np.random.default_rng(0)
    change(model, "features.3.weight", lambda weight: weight * rng.normal(1, 0.01, weight.shape).astype(np.float32))


def change_one_weight(model: ModelProto) -> None:
    def changed(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        weight[0, 0, 1, 1] += 0.05
        return weight

    change(model, "features.3.weight", changed)


def round_to_half(model: ModelProto) -> None:
    """What a tool leaves that lowers the precision unasked: every prediction stays the same."""
    for name in ("features.0.weight", "features.3.weight", "head.weight"):
        change(model, name, lambda weight: weight.astype(np.float16).astype(np.float32))


def swap_classes(model: ModelProto) -> None:
    order = [0, 3, 2, 1, 4]
    change(model, "head.weight", lambda weight: weight[order])
    change(model, "head.bias", lambda bias: bias[order])


def put_nan(model: ModelProto) -> None:
    def changed(bias: NDArray[np.float32]) -> NDArray[np.float32]:
        bias[2] = np.nan
        return bias

    change(model, "head.bias", changed)


def put_hidden_infinity(model: ModelProto) -> None:
    """Minus infinity behind a ReLU: the logits stay finite."""

    def changed(bias: NDArray[np.float32]) -> NDArray[np.float32]:
        bias[2] = -np.inf
        return bias

    change(model, "features.3.bias", changed)


def fix_batch(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def fix_batch_inside(model: ModelProto) -> None:
    """The interface still promises any batch; a Reshape inside takes one image only."""
    node = model.graph.node[-1]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 5], dtype=np.int64), "one_row"))
    node.output[0] = "before"
    model.graph.node.append(helper.make_node("Reshape", ["before", "one_row"], ["logits"]))


def put_all_images_in_one_row(model: ModelProto) -> None:
    node = model.graph.node[-1]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, -1], dtype=np.int64), "one_row"))
    node.output[0] = "before"
    model.graph.node.append(helper.make_node("Reshape", ["before", "one_row"], ["logits"]))


def drop_a_class(model: ModelProto) -> None:
    change(model, "head.weight", lambda weight: weight[:4])
    change(model, "head.bias", lambda bias: bias[:4])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4


def take_doubles(model: ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["as_float"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "as_float"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


BROKEN = [
    (perturb_weights, "the logits are not the network's"),
    (change_one_weight, "the logits are not the network's"),
    (round_to_half, "the same predictions on 100.00 %"),
    (swap_classes, "classes have changed places (1 holds 3, 3 holds 1)"),
    (put_nan, "the file holds NaN or infinity in head.bias: NaN or infinite logits for 50 of 50 samples"),
    (put_hidden_infinity, "the file holds NaN or infinity in features.3.bias"),
    (fix_batch, "its batch is fixed at 1"),
    (fix_batch_inside, "cannot run on images of shape [7, 3, 8, 8]"),
    (put_all_images_in_one_row, "gives logits of shape [1, 35] for 7 images, expected [7, 5]"),
    (drop_a_class, "it gives 4 classes, the network gives 5"),
    (take_doubles, "expected one float32 or float16 input"),
    (lambda model: state(model, "mean", "[0.5, 0.5, 0.5]"), "its metadata states mean (0.5, 0.5, 0.5)"),
    (lambda model: state(model, "input_range", "0...1"), "its normalisation is wrong, it takes images normalised"),
    (lambda model: state(model, "mean", "half"), "metadata cannot be read"),
    (lambda model: model.ClearField("metadata_props"), "its metadata does not say how images are normalised"),
]


def test_a_correct_file_passes_with_its_numbers(network: nn.Module, exported: Path, samples: Samples) -> None:
    result = check(network, exported, samples)
    assert result.verified
    assert result.agreement == 100.0
    assert result.max_abs_error is not None
    assert result.max_abs_error < 1e-5
    assert result.reason.startswith("max abs error ")
    assert "the same predictions on 100.00 % of 50 samples" in result.reason


@pytest.mark.parametrize(("damage", "reason"), BROKEN)
def test_each_way_to_break_a_file_is_found_and_named(
    damage: Callable[[ModelProto], None],
    reason: str,
    network: nn.Module,
    exported: Path,
    samples: Samples,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = onnx.load(exported)
    damage(model)
    onnx.save(model, tmp_path / "model.onnx")
    result = check(network, tmp_path / "model.onnx", samples)
    assert not result.verified
    assert reason in result.reason
    assert capfd.readouterr() == ("", "")


def test_the_size_of_the_damage_is_measured(
    network: nn.Module, exported: Path, samples: Samples, tmp_path: Path
) -> None:
    model = onnx.load(exported)
    change(model, "head.bias", lambda bias: bias + np.array([0, 0, 0.25, 0, 0], dtype=np.float32))
    onnx.save(model, tmp_path / "model.onnx")
    result = check(network, tmp_path / "model.onnx", samples)
    assert result.max_abs_error == pytest.approx(0.25, abs=1e-5)
    assert result.agreement is not None
    assert 0 <= result.agreement < 100


def tied(network: nn.Module) -> nn.Module:
    """The network with class 3 made a copy of class 1, both far ahead of the others: every prediction is a tie."""
    student = copy.deepcopy(network)
    weight, bias = student.get_parameter("head.weight"), student.get_parameter("head.bias")
    with torch.no_grad():
        weight[3] = weight[1]
        bias[3] = bias[1] = 20
    return student


def test_a_tie_that_rounding_breaks_the_other_way_is_no_disagreement(
    network: nn.Module, samples: Samples, tmp_path: Path
) -> None:
    student = tied(network)
    write_onnx(student, tmp_path / "model.onnx", input_shape=SHAPE, metadata=metadata())
    model = onnx.load(tmp_path / "model.onnx")
    change(model, "head.bias", lambda bias: np.where(np.arange(5) == 3, np.nextafter(bias, np.float32(99)), bias))
    onnx.save(model, tmp_path / "model.onnx")
    result = check(student, tmp_path / "model.onnx", samples)
    assert result.agreement == 100.0
    assert result.verified, result.reason


def test_predictions_that_differ_by_more_than_rounding_are_not_blamed_on_something_else(
    network: nn.Module, samples: Samples, tmp_path: Path
) -> None:
    student = tied(network)
    write_onnx(student, tmp_path / "model.onnx", input_shape=SHAPE, metadata=metadata())
    with torch.no_grad():
        student.get_parameter("head.bias")[1] += 3.2e-5  # class 1 is ahead in the student, class 3 in the file
    model = onnx.load(tmp_path / "model.onnx")
    change(model, "head.bias", lambda bias: bias + np.array([0, 0, 0, 2e-5, 0], dtype=np.float32))
    onnx.save(model, tmp_path / "model.onnx")
    result = check(student, tmp_path / "model.onnx", samples)
    assert (result.verified, result.agreement) == (False, 0.0)
    assert result.reason.startswith("the predictions are not the network's, ")


@pytest.mark.parametrize(("pixels", "batches"), [(8, [1, 7, 22]), (256, [1, 7, 16, 6]), (512, [1, 7, *[4] * 5, 2])])
def test_large_samples_are_run_in_smaller_batches(
    pixels: int, batches: list[int], samples: Samples, network: nn.Module, tmp_path: Path
) -> None:
    student, seen = copy.deepcopy(network), []
    student.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    large = samples[:30].repeat(pixels // 8, axis=1).repeat(pixels // 8, axis=2)
    assert "no model file" in check(student, tmp_path / "gone.onnx", large).reason  # the student runs first
    assert seen == batches


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_file(keep: float, network: nn.Module, exported: Path, samples: Samples, tmp_path: Path) -> None:
    content = exported.read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: int(len(content) * keep) if keep == 0.5 else int(keep)])
    result = check(network, tmp_path / "model.onnx", samples)
    assert (result.verified, result.max_abs_error, result.agreement) == (False, None, None)
    assert "cannot be opened by ONNX Runtime" in result.reason


def test_missing_file(network: nn.Module, samples: Samples, tmp_path: Path) -> None:
    assert "no model file" in check(network, tmp_path / "model.onnx", samples).reason


def metadata(*, embed_preprocessing: bool = False) -> dict[str, str]:
    return metadata_for(
        input_shape=SHAPE,
        classes=5,
        class_names=None,
        mean=MEAN,
        std=STD,
        embed_preprocessing=embed_preprocessing,
        teacher_sha256="",
    )


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda network: WithPreprocessing(network, MEAN, STD), "max abs error"),
        (lambda network: WithPreprocessing(network, MEAN, (0.25, 0.25, 0.25)), "the logits are not the network's"),
        (lambda network: WithPreprocessing(network, tuple(reversed(MEAN)), STD), "the logits are not the network's"),
        (lambda network: network, "its normalisation is wrong, it takes images normalised"),
    ],
)
def test_embedded_preprocessing_is_proven_from_the_pixels_on(
    wrap: Callable[[nn.Module], nn.Module], reason: str, network: nn.Module, samples: Samples, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(wrap(network).eval(), path, input_shape=SHAPE, metadata=metadata(embed_preprocessing=True))
    result = check(network, path, samples)
    assert result.verified is (reason == "max abs error")
    assert reason in result.reason


class MixesTheBatch(nn.Module):
    """Right for one image alone: what it adds is the distance to the batch's mean."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(2 * images - images.mean(0, keepdim=True))


def test_images_that_affect_each_other(network: nn.Module, samples: Samples, tmp_path: Path) -> None:
    write_onnx(MixesTheBatch(network), tmp_path / "model.onnx", input_shape=SHAPE, metadata=metadata())
    result = check(network, tmp_path / "model.onnx", samples)
    assert not result.verified
    assert "an image's logits depend on the images beside it" in result.reason


def test_int8_hides_no_mixed_batch_behind_an_average(
    other_precisions: dict[str, Path], network: nn.Module, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = open_runtime(other_precisions["int8"])

    def first_batches_mixed_up(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return runtime.run(batch)[::-1] if len(batch) == 7 else runtime.run(batch)

    monkeypatch.setattr(verifier, "open_runtime", lambda _: replace(runtime, run=first_batches_mixed_up))
    many = np.concatenate([samples] * 20)  # among which seven do not show in a root mean square
    found = verify(network, other_precisions["int8"], many, mean=MEAN, std=STD, precision="int8")
    assert found.verified is False
    assert found.reason.startswith("an image's logits depend on the images beside it")


def test_samples_of_another_size(network: nn.Module, exported: Path) -> None:
    others = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    assert "it takes images of 3x8x8, the network takes 3x16x16" in check(network, exported, others).reason


@pytest.mark.parametrize("count", [0, 1, 20])
def test_samples_without_a_difference_prove_nothing(
    count: int, network: nn.Module, exported: Path, samples: Samples
) -> None:
    result = check(network, exported, samples[:1].repeat(count, axis=0))
    assert not result.verified
    assert "fewer than two different samples" in result.reason


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "the same logits for every sample"), (float("nan"), "the network itself gives NaN")]
)
def test_a_student_that_proves_nothing(
    value: float, reason: str, network: nn.Module, exported: Path, samples: Samples
) -> None:
    student = copy.deepcopy(network)
    with torch.no_grad():
        student.get_parameter("head.weight").fill_(value)
    result = check(student, exported, samples)
    assert not result.verified
    assert reason in result.reason


def test_the_student_is_compared_in_eval_mode_and_left_in_train_mode(
    network: nn.Module, exported: Path, samples: Samples
) -> None:
    student = copy.deepcopy(network).train()
    assert check(student, exported, samples).verified
    assert all(child.training for child in student.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)


@pytest.fixture(scope="module")
def other_precisions(exported: Path, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network in fp16 and int8."""
    model, folder = onnx.load(exported), tmp_path_factory.mktemp("precisions")
    graphs = {"fp16": to_fp16(model), "int8": to_int8(model, to_input(samples, MEAN, STD), Scheme())}
    for name, graph in graphs.items():
        onnx.save(graph, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_pass_by_their_own_limits(
    precision: str, other_precisions: dict[str, Path], network: nn.Module, samples: Samples
) -> None:
    path = other_precisions[precision]
    passed = verify(network, path, samples, mean=MEAN, std=STD, precision=precision)
    assert passed.verified, passed.reason
    assert passed.max_abs_error is not None
    assert passed.max_abs_error > 1e-5
    as_float = verify(network, path, samples, mean=MEAN, std=STD)
    assert as_float.verified is False
    assert as_float.reason.startswith("fp32 was asked for")


def test_a_float_graph_is_not_taken_for_another_precision(exported: Path, network: nn.Module, samples: Samples) -> None:
    for precision in ("fp16", "int8"):
        failed = verify(network, exported, samples, mean=MEAN, std=STD, precision=precision)
        assert failed.verified is False
        assert failed.reason.startswith(f"{precision} was asked for")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_wrong_weights_are_found_in_every_precision(
    precision: str, other_precisions: dict[str, Path], network: nn.Module, samples: Samples
) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.head.weight.copy_(other.head.weight.flip(0))
    failed = verify(other, other_precisions[precision], samples, mean=MEAN, std=STD, precision=precision)
    assert failed.verified is False
    assert "are not the network's" in failed.reason or "changed places" in failed.reason


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda logits, spread: logits + np.eye(*logits.shape) * 2 * spread[2], None),  # five logits, far off
        (lambda logits, spread: logits + np.eye(5)[2] * 0.9 * spread[2], "the logits are not the network's, rms error"),
        (lambda logits, spread: logits * (1 - np.eye(5)[3]), "the logits are not the network's, rms error"),
        (lambda logits, spread: logits[:, [1, 0, 2, 3, 4]], "classes have changed places (0 holds 1, 1 holds 0)"),
    ],
)
def test_int8_is_held_to_what_a_class_does_over_all_images(
    damage: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]],
    reason: str | None,
    other_precisions: dict[str, Path],
    network: nn.Module,
    samples: Samples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = predictor(network)(to_input(samples, MEAN, STD))
    wrong = damage(exact, exact.std(axis=0)).astype(np.float32)
    known = {image.tobytes(): logits for image, logits in zip(to_input(samples, MEAN, STD), wrong, strict=True)}

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([known.get(image.tobytes(), wrong[0]) for image in batch])  # else fed otherwise

    runtime = replace(open_runtime(other_precisions["int8"]), run=run)
    monkeypatch.setattr(verifier, "open_runtime", lambda _: runtime)
    found = verify(network, other_precisions["int8"], samples, mean=MEAN, std=STD, precision="int8")
    assert found.verified is (reason is None)
    assert (reason or "rms error") in found.reason
