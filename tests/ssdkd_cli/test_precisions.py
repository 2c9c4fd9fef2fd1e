"""INT8 on its way: which step is taken when, and what is said of it."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from engine.device import choose_device
from engine.errors import NonFiniteLossError, SSDKDError
from engine.images import normalization
from engine.quantization import image_range, quantized_layers
from engine.teacher import load_teacher
from exporters.precision import Scheme
from exporters.runtimes import open_runtime, to_input
from exporters.verify import Verification
from ssdkd_cli import precisions, runs
from ssdkd_cli.loss import Loss, loss_of
from ssdkd_cli.precisions import Graph, Integers, half_graph, integer_graph
from ssdkd_cli.proving import with_loss
from ssdkd_cli.subject import Subject, float_graph

RANGES, TOGETHER = "calibrated on synthetic samples", "weights rounded together, biases corrected"


@pytest.fixture(scope="module")
def subject(shared: Path) -> Subject:
    """A teacher that is exported as it is, with smooth random images in the place of samples."""
    teacher = load_teacher(shared / "teacher.pt", input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 4, 4, 1), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    with torch.no_grad():
        logits = teacher.module(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).numpy()
    samples = runs.Samples(images[:200], logits[:200], images[200:])
    return Subject(teacher.module, runs.teacher_card(teacher.spec, "same"), samples, False)


def integers_for(scheme: Scheme, *, qat: str = "off", fallback: bool = False) -> Integers:
    return Integers(scheme, qat, fallback, choose_device("cpu"), seed=0)


def int8(subject: Subject, *, qat: str = "auto", fallback: bool = True) -> Graph:
    return integer_graph(subject, float_graph(subject), integers_for(Scheme(), qat=qat, fallback=fallback))


def logits(model: onnx.ModelProto, subject: Subject) -> NDArray[np.float32]:
    """Of the held-out samples."""
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "model.onnx")
        return open_runtime(Path(folder) / "model.onnx").run(to_input(subject.samples.held_out, *subject.fed))


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `judged` say that a graph with fewer than so many layers in float loses 9 points."""

    def until(layers: int) -> None:
        judged = precisions.judged

        def worse(
            subject: Subject, exported: Any, integers: Any, done: str, float_layers: tuple[str, ...] = ()
        ) -> Graph:
            graph = judged(subject, exported, integers, done, float_layers)
            lost = 9.0 if len(float_layers) < layers else 0.0
            return dataclasses.replace(graph, loss=Loss(lost, 0.0, 200), notes=(f"{done}: {lost} points lost",))

        monkeypatch.setattr(precisions, "judged", worse)
        monkeypatch.setattr(precisions, "STEPS", 3)

    return until


def test_where_nothing_is_lost_ranges_and_rounding_are_enough(subject: Subject, losing: Any) -> None:
    losing(0)  # x86 without VNNI saturates and loses some
    graph = int8(subject)
    assert graph.loss.is_within
    assert graph.integer_share == 1.0
    assert graph.float_layers == ()
    assert [note.partition(":")[0] for note in graph.notes] == [RANGES, TOGETHER]


def test_float16_needs_no_steps(subject: Subject) -> None:
    graph = half_graph(float_graph(subject))
    assert (graph.precision, graph.notes, graph.loss) == ("fp16", (), Loss())


def test_weights_rounded_together_are_nearer_to_the_float_network(subject: Subject, losing: Any) -> None:
    losing(0)
    graph, plain = int8(subject), precisions.judged(subject, float_graph(subject), integers_for(Scheme()), "")
    errors = [float(((logits(made, subject) - subject.logits) ** 2).mean()) for made in (graph.model, plain.model)]
    assert errors == pytest.approx([graph.error, plain.error])
    assert errors[0] < 0.8 * errors[1]


def test_rounding_that_moves_the_logits_further_is_left_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of layers that compute with another weight than the one they hold (timm's StdConv2d)."""
    together = precisions.rounded_together

    def harmed(subject: Subject, integers: Integers) -> nn.Module:
        module = together(subject, integers)
        for layer in quantized_layers(module).values():
            layer.weight.mul_(1.2)
        return module

    monkeypatch.setattr(precisions, "rounded_together", harmed)
    graph = int8(subject, qat="off", fallback=False)
    plain = precisions.judged(subject, float_graph(subject), integers_for(Scheme()), RANGES)
    assert graph.notes[0] == plain.notes[0]
    assert graph.notes[1].startswith(f"{TOGETHER}: ")
    assert graph.notes[1].endswith(", no gain: it was left out")
    assert graph.error == plain.error


@pytest.mark.parametrize(("before", "after", "is_kept"), [(0.7, 2.2, False), (2.2, 0.7, True), (0.1, 0.4, True)])
def test_rounding_that_loses_more_agreement_than_may_be_lost_is_left_out(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, before: float, after: float, is_kept: bool
) -> None:
    judged = precisions.judged

    def losing_points(subject: Subject, exported: Any, integers: Any, done: str) -> Graph:
        return dataclasses.replace(
            judged(subject, exported, integers, done),
            loss=Loss(after if done.startswith(TOGETHER) else before, 0.0, 200),
        )

    monkeypatch.setattr(precisions, "judged", losing_points)
    graph = int8(subject, qat="off", fallback=False)
    assert graph.loss.points == (after if is_kept else before)
    refused = ", more agreement is lost than before, and than may be: it was left out"
    assert graph.notes[1].endswith(": kept" if is_kept else refused)


@pytest.mark.parametrize("embeds", [False, True])
def test_the_image_of_a_file_has_the_range_of_all_pixels(subject: Subject, embeds: bool) -> None:
    within = Subject(subject.module, subject.card, subject.samples, embeds)
    graph = precisions.judged(within, float_graph(within), integers_for(Scheme()), "").model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    low, high = image_range(normalization((0.5,), (0.5,), torch.device("cpu")))
    assert float(values[first.input[1]]) == pytest.approx((high - low) / 255)
    assert high > 1.0


def test_the_step_that_helps_is_kept(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    judged, calls = precisions.judged, []

    def first_two_are_bad(*given: Any) -> Graph:
        calls.append(given)
        return dataclasses.replace(judged(*given), loss=Loss(9.0 if len(calls) < 3 else 0.25, 0.0, 200))

    monkeypatch.setattr(precisions, "judged", first_two_are_bad)
    monkeypatch.setattr(precisions, "STEPS", 3)
    graph = int8(subject)
    assert graph.loss.points == 0.25
    assert len(graph.notes) == 3
    assert graph.notes[2].startswith("3 steps of quantization-aware distillation: ")


def test_every_step_is_tried_in_turn_and_said(subject: Subject, losing: Any) -> None:
    losing(2)
    graph = int8(subject)
    words = " | ".join(graph.notes)
    assert f"{RANGES}: 9.0 points" in words
    assert f"{TOGETHER}: 9.0 points" in words
    of_training = next(note for note in graph.notes if "quantization-aware distillation" in note)
    assert of_training == "3 steps of quantization-aware distillation: 9.0 points lost, no gain: it was left out"
    assert f"{TOGETHER}: 9.0 points lost; rms error of the logits " in words
    assert f"2 layers left in float32 ({', '.join(graph.float_layers)})" in words
    assert len(graph.float_layers) == 2
    kept = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    own = {tensor.name: numpy_helper.to_array(tensor) for tensor in float_graph(subject).graph.initializer}
    for name in graph.float_layers:  # the float network's, not those that were rounded
        assert np.allclose(kept[f"{name}.weight"], own[f"{name}.weight"], atol=1e-6)
    assert graph.integer_share < 1.0
    assert graph.loss.points == 0.0


def test_without_fallback_no_layer_is_swapped(subject: Subject, losing: Any) -> None:
    losing(1)
    graph = int8(subject, qat="off", fallback=False)
    assert graph.float_layers == ()
    assert graph.loss.points == 9.0
    assert not any("distillation" in note for note in graph.notes)


def test_a_fallback_that_would_leave_too_little_in_integers_is_not_taken(subject: Subject, losing: Any) -> None:
    losing(99)
    graph = int8(subject, qat="off")
    assert graph.loss.points == 9.0
    assert graph.notes[-1] == "leaving the worst layers in float32 did not bring it back"


def test_qat_on_trains_even_where_nothing_is_lost(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "STEPS", 3)
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    graph = int8(subject, qat="on")
    assert any("quantization-aware distillation" in note for note in graph.notes)
    assert all(torch.equal(value, before[name]) for name, value in subject.module.state_dict().items())


def test_layers_are_found_behind_an_embedded_normalisation(subject: Subject, losing: Any) -> None:
    losing(1)
    embedded = Subject(subject.module, subject.card, subject.samples, True)
    graph = int8(embedded, qat="off")
    assert len(graph.float_layers) == 1
    assert graph.integer_share < 1.0


def test_few_samples_cannot_show_half_a_point() -> None:
    allowed = [Loss(samples=samples).allowed for samples in (1024, 16, 3)]
    assert allowed == pytest.approx([0.5, 6.25, 10])  # with one of three lost the proof would reject the file


def test_the_loss_is_net_and_its_margin_grows_with_what_turned(subject: Subject) -> None:
    teachers = subject.samples.held_out_logits.argmax(1)
    assert loss_of(subject, subject.predicted) == Loss(0.0, 0.0, 200)
    wrong = teachers.copy()
    wrong[:9] = (teachers[:9] + 1) % subject.card.classes  # of 200, all of which were right
    assert loss_of(subject, wrong) == Loss(4.5, pytest.approx(100 * 1.645 * 3 / 200), 200)


@pytest.mark.parametrize(
    ("loss", "is_within", "is_in_doubt"),
    [
        (Loss(1.5, 1.2, 264), False, True),  # 4 of 264 lost, none gained: may be chance
        (Loss(1.5, 0.9, 264), False, False),
        (Loss(0.5, 0.0, 264), True, False),
        (Loss(-3.0, 0.0, 264), True, False),
    ],
)
def test_what_may_be_chance_is_a_doubt(loss: Loss, is_within: bool, is_in_doubt: bool) -> None:
    assert (loss.is_within, loss.is_in_doubt) == (is_within, is_in_doubt)
    found = with_loss(Verification(True, "rms error 0.1", 0.2, 98.5), loss)
    assert (found.verified, found.doubt is not None) == (is_within or is_in_doubt, is_in_doubt)
    assert ("it loses 1.50 points of agreement with the teacher, 0.50 may be lost" in found.reason) == (not is_within)
    assert ("which on 264 samples may be chance" in found.reason) == is_in_doubt


@pytest.mark.parametrize(("samples", "is_in_doubt"), [(99, True), (100, False)])
def test_too_few_samples_leave_a_doubt_whatever_they_show(samples: int, is_in_doubt: bool) -> None:
    proven = Verification(True, "rms error 0.1", 0.2, 98.5)
    found = with_loss(proven, Loss(samples=samples))
    assert found.verified
    assert (found.doubt is not None) == is_in_doubt
    assert found.reason.startswith("99 held-out samples, fewer than 100, are too few to show what") == is_in_doubt
    assert not with_loss(proven, Loss(20.0, 3.0, samples)).verified  # that is too much for any number of samples


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Loss(0.0, 0.0, 264), "as much agreement with the teacher as in float32, of 264 samples"),
        (Loss(0.38, 0.62, 264), "0.38 ± 0.62 points less agreement with the teacher than in float32, of 264 samples"),
        (Loss(-0.4, 1.1, 256), "0.40 ± 1.10 points more agreement with the teacher than in float32, of 256 samples"),
    ],
)
def test_a_loss_is_said_with_its_margin(loss: Loss, said: str) -> None:
    assert str(loss) == said


@pytest.mark.parametrize("qat", ["on", "auto"])
def test_a_network_that_cannot_be_trained_is_refused_where_that_was_asked_for(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, losing: Any, qat: str
) -> None:
    losing(1)
    monkeypatch.setattr(precisions, "quantized_layers", lambda _: {})
    if qat == "auto":
        assert int8(subject, qat=qat).notes[-1] == precisions.UNTRAINABLE
    else:
        with pytest.raises(SSDKDError, match="--qat on: its layers are a graph's operations") as caught:
            int8(subject, qat=qat)
        assert "leave --qat out" in caught.value.hint


@pytest.mark.parametrize("qat", ["on", "auto"])
def test_a_training_that_goes_astray_is_left_out_unless_it_was_asked_for(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, losing: Any, qat: str
) -> None:
    losing(1)

    def astray(*_: object, **__: object) -> NoReturn:
        raise NonFiniteLossError("the loss is not finite in step 1", "")

    monkeypatch.setattr(precisions, "aware", astray)
    if qat == "auto":
        notes = int8(subject, qat=qat, fallback=False).notes
        assert notes[-1] == "the loss is not finite in step 1; it was left out"
    else:
        with pytest.raises(NonFiniteLossError):
            int8(subject, qat=qat)


def test_the_notes_say_which_of_two_graphs_was_kept(subject: Subject) -> None:
    graph = dataclasses.replace(half_graph(float_graph(subject)), error=0.04, notes=("first: as much",))
    tried = dataclasses.replace(graph, error=0.01, notes=("second: 0.78 points less",))
    assert precisions.better(graph, tried, "").notes == ("first: as much", "second: 0.78 points less: kept")
    left = precisions.better(graph, tried, "no gain")
    assert left.error == 0.04
    assert left.notes == ("first: as much", "second: 0.78 points less, no gain: it was left out")
    assert precisions.errors_in_words(0.01, 0.04) == "rms error of the logits 0.1, before 0.2"


@pytest.mark.parametrize("seven_bits", [True, False])
def test_the_file_holds_the_weights_that_were_rounded_together(subject: Subject, seven_bits: bool) -> None:
    integers = integers_for(Scheme(reduce_range=seven_bits))
    exported = float_graph(subject, precisions.rounded_together(subject, integers))
    graph = precisions.judged(subject, exported, integers, "").model.graph
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    made = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    read = [node for node in graph.node if node.op_type == "DequantizeLinear" and made[node.input[1]].ndim == 1]
    weights = {node.input[0].removesuffix("_quantized"): node.input for node in read if node.input[0] in made}
    weights = {name: given for name, given in weights.items() if name.endswith(".weight")}
    assert len(weights) == len(quantized_layers(subject.module))
    for name, (integer, scale, *_) in weights.items():
        wide = made[scale].reshape(-1, *[1] * (made[integer].ndim - 1))
        image_channels = floats[name].shape[1]  # the first layer has channels of zeros besides
        found = (made[integer] * wide)[:, :image_channels]
        assert np.allclose(found, floats[name], atol=1e-3 * float(made[scale].min())), name
