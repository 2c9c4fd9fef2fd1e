import pytest
import torch
from torch import Tensor, nn

from engine.device import Compute
from engine.images import normalization
from engine.losses import BatchNormPrior, ChannelStatistics, batchnorm_prior
from engine.spread import spread_loss, spread_of_leaves

CPU = Compute(torch.device("cpu"), None)
HALF = Compute(torch.device("cpu"), torch.bfloat16)
CONSTANTS = normalization((0.5,), (0.25,), CPU.device)


def prior_of(*variances: list[float]) -> BatchNormPrior:
    layers = []
    for values in variances:
        layer = nn.BatchNorm2d(len(values)).eval()
        layer.running_var = torch.tensor(values)
        layers.append(layer)
    return batchnorm_prior(layers)


def spread(teacher: nn.Module, *, batch: int, compute: Compute = CPU) -> Tensor:
    prior = batchnorm_prior([layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)])
    return spread_of_leaves(teacher, prior, (1, 16, 16), CONSTANTS, batch=batch, compute=compute)


def test_loss_by_hand() -> None:
    prior = prior_of([4.0, 4.0], [1.0])
    # deviations between images: 1/2 and 0 of layer 1's running ones, 3/10 of layer 2's
    loss = spread_loss(prior, torch.tensor([1.0, 0.0, 0.09]), torch.tensor([0.75, 0.5, 0.4]))
    assert loss.item() == pytest.approx((0.25**2 + 0.5**2) / 4 + 0.1**2 / 2, rel=0.01)


def test_images_that_lie_far_enough_apart_cost_nothing() -> None:
    assert spread_loss(prior_of([4.0, 4.0]), torch.tensor([4.0, 1.1]), torch.tensor([0.75, 0.5])).item() == 0


def test_images_that_are_all_the_same_can_be_pulled_apart() -> None:
    prior = prior_of([1.0, 2.0])
    features = torch.zeros(4, 2, 3, 3)
    features[0] = 1e-4
    features.requires_grad_()
    spread_loss(prior, ChannelStatistics.apply(features, True)[2], torch.tensor([0.5, 0.5])).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert (features.grad[0] < 0).all()  # the one that differs is to differ more
    assert (features.grad[1:] > 0).all()


def test_spread_of_leaves_is_a_share_of_each_layers_deviation_whatever_the_batch() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
    ).eval()
    small, large = spread(teacher, batch=32), spread(teacher, batch=128)
    assert small.shape == (9,)
    assert 0.3 < small[0] < 0.7  # of brightness: about a quarter of the variance
    assert ((small[:5] > 0) & (small[:5] < 1)).all()
    torch.testing.assert_close(small[5:], torch.ones(4), atol=0.1, rtol=0)  # one place an image: all lies between
    torch.testing.assert_close(small, large, atol=0.05, rtol=0)
    torch.testing.assert_close(spread(teacher, batch=500), large, atol=0.05, rtol=0)
    torch.testing.assert_close(spread(teacher, batch=128, compute=HALF), large, atol=0.01, rtol=0)
    assert spread(teacher, batch=1).max() < 1e-6  # one image lies apart from none


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    state = torch.get_rng_state()
    spread(teacher, batch=64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in teacher)
