import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import replay
from engine.alteration import alter
from engine.config import DistillationSettings
from engine.device import Compute
from engine.features import compared, teacher_maps
from engine.images import normalization, render, to_input
from engine.recording import Outputs
from engine.replay import ReplayBuffer
from engine.stages import Stages, stages_of
from engine.task import Classification
from engine.teaching import (
    Batch,
    averaged_tensors,
    empty_batch,
    learning_parameters,
    loss_and_gradients,
    new_optimizer,
    update_average,
)
from engine.zoo import resnet_cifar

CPU = torch.device("cpu")
CLASSES = 4
CONSTANTS = normalization((0.5,), (0.25,), CPU)
SETTINGS = DistillationSettings(student_rate=0.1, inherited_rate=0.1)


class StandardisedConv(nn.Conv2d):
    """Its weight is reshaped before it is used, as weight-standardised networks do: its gradient has another layout."""

    def forward(self, images: Tensor) -> Tensor:
        rows = self.weight.reshape(1, len(self.weight), -1)
        weight = F.batch_norm(rows, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(images, weight, self.bias, self.stride, self.padding)


def student() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), StandardisedConv(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def drawn() -> tuple[ReplayBuffer, Batch]:
    rng = torch.Generator().manual_seed(0)
    buffer = replay.empty_buffer(32, (1, 12, 12), views=2, classes=CLASSES, device=CPU)
    images = torch.randint(256, (32, 12, 12, 1), generator=rng, dtype=torch.uint8)
    views = torch.randint(2, (32, 2, 3), generator=rng)
    logits, classes = torch.randn(32, 2, CLASSES, generator=rng), torch.randint(CLASSES, (32,), generator=rng)
    replay.add(buffer, torch.arange(32), images, views, logits, classes, torch.rand(32, generator=rng))
    batch = empty_batch(8, 1, CPU)
    batch.slots.copy_(torch.arange(3, 11))
    batch.views.copy_(torch.arange(8) % 2)
    batch.weights.copy_(torch.linspace(0.2, 3.0, 8))
    batch.feature_weight.fill_(2.5)
    return buffer, batch


def outputs(
    network: nn.Module, drawn: tuple[ReplayBuffer, Batch], stages: Stages | None = None, *, alters: bool = False
) -> Outputs:
    buffer, batch = drawn
    return loss_and_gradients(
        network,
        batch,
        buffer,
        task=Classification(CLASSES),
        normalization=CONSTANTS,
        stages=stages,
        alters=alters,
        temperature=4.0,
        compute=Compute(CPU, None),
    )


def test_loss_and_gradients_are_those_of_backward(drawn: tuple[ReplayBuffer, Batch]) -> None:
    buffer, batch = drawn
    network = student()
    (loss, feature_loss, divergences, said), gradients = outputs(network, drawn)
    seen = render(buffer.images, batch.slots, buffer.views[batch.slots, batch.views])
    known = buffer.logits[batch.slots, batch.views]
    each = Classification(CLASSES).discrepancy(known, network(to_input(seen, CONSTANTS)), 4.0)
    expected = (batch.weights * each).sum() / batch.weights.sum()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(divergences, each.detach())
    assert torch.equal(said, known)
    assert feature_loss == 0
    torch.testing.assert_close(loss, expected.detach())
    for parameter, gradient in zip(learning_parameters(network), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_with_stages_the_teacher_sees_the_view_and_its_maps_are_learned_too(
    drawn: tuple[ReplayBuffer, Batch],
) -> None:
    buffer, batch = drawn
    network, teacher = resnet_cifar(CLASSES, 1, depth=8, width=4), resnet_cifar(CLASSES, 1, depth=14, width=4).eval()
    stages = stages_of(network, teacher, (1, 12, 12), batch=4)
    assert stages.pairs
    (loss, feature_loss, _, said), gradients = outputs(network, drawn, stages)
    inputs = to_input(render(buffer.images, batch.slots, buffer.views[batch.slots, batch.views]), CONSTANTS)
    logits, maps = teacher_maps(stages, inputs)
    weights = batch.weights / batch.weights.mean()
    with compared(stages, maps, weights) as errors:
        each = Classification(CLASSES).discrepancy(logits, network(inputs), 4.0)
    expected, expected_feature = (weights * each).mean(), torch.stack(errors).sum()
    (expected + 2.5 * expected_feature).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(feature_loss, expected_feature.detach())
    torch.testing.assert_close(said, logits)
    for parameter, gradient in zip(learning_parameters(network), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_with_a_teacher_that_looks_on_every_second_image_is_altered_for_both(
    drawn: tuple[ReplayBuffer, Batch],
) -> None:
    buffer, batch = drawn
    batch.numbers.normal_(generator=torch.Generator().manual_seed(1))
    network, teacher = student(), resnet_cifar(CLASSES, 1, depth=8, width=4).eval()
    (loss, feature_loss, divergences, said), _ = outputs(network, drawn, Stages(teacher, ()), alters=True)
    plain = to_input(render(buffer.images, batch.slots, buffer.views[batch.slots, batch.views]), CONSTANTS)
    inputs = alter(plain, batch.numbers)
    assert torch.equal(inputs[1::2], plain[1::2])
    with torch.no_grad():
        torch.testing.assert_close(said, teacher(inputs))
        each = Classification(CLASSES).discrepancy(teacher(inputs), network(inputs), 4.0)
    torch.testing.assert_close(divergences, each)
    torch.testing.assert_close(loss, (batch.weights * each).sum() / batch.weights.sum())
    assert feature_loss == 0
    known = outputs(network, drawn, None, alters=True).losses[3]  # nobody looks on: nothing is altered
    assert torch.equal(known, buffer.logits[batch.slots, batch.views])


def test_a_fused_step_moves_a_student_as_the_plain_one_does(drawn: tuple[ReplayBuffer, Batch]) -> None:
    network = student()
    plain = copy.deepcopy(network)
    fused = new_optimizer(network, frozenset(), SETTINGS)
    usual = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=False)
    for _ in range(3):
        for moved, optimizer in ((network, fused), (plain, usual)):
            for parameter, gradient in zip(learning_parameters(moved), outputs(moved, drawn).gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    before = student()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)
        assert not torch.equal(value, before.state_dict()[name]), name


def test_every_gradient_has_the_layout_of_its_parameter(drawn: tuple[ReplayBuffer, Batch]) -> None:
    network = student()
    for parameter, gradient in zip(learning_parameters(network), outputs(network, drawn).gradients, strict=True):
        assert gradient.stride() == parameter.stride()


def test_a_parameter_without_a_part_in_the_logits_has_a_gradient_of_zero(drawn: tuple[ReplayBuffer, Batch]) -> None:
    network = student()
    network.register_parameter("unused", nn.Parameter(torch.ones(3)))
    network.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    gradients = outputs(network, drawn).gradients
    assert len(gradients) == len(list(network.parameters())) - 1
    assert any(torch.equal(gradient, torch.zeros(3)) for gradient in gradients)


def test_what_layers_share_is_averaged_once() -> None:
    student = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    student[1].weight = student[0].weight
    average = copy.deepcopy(student)
    with torch.no_grad():
        student[0].weight += 1
    before = average[0].weight.detach().clone()
    update_average(averaged_tensors(average), averaged_tensors(student), decay=0.9, steps=99)
    torch.testing.assert_close(average[0].weight - before, torch.full((2, 2), 0.1))


def test_batchnorm_statistics_are_averaged_and_counts_are_not() -> None:
    layer = nn.BatchNorm1d(3)
    assert [tuple(tensor.shape) for tensor in averaged_tensors(layer)] == [(3,)] * 4  # weight, bias, mean, variance
