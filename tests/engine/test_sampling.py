import dataclasses
import math

import pytest
import torch
from torch import nn

from engine import sampling
from engine.batchnorm import batchnorm_layers
from engine.config import settings_for
from engine.device import Compute
from engine.errors import NonFiniteLossError
from engine.sampling import LEARNING_ROUNDS, rounds_for, synthesize
from engine.source import Source
from engine.task import Classification
from engine.threads import Threads
from engine.zoo import resnet_cifar

SETTINGS = settings_for("smoke", image_shape=(1, 16, 16), inversion_batch=16, inversion_steps=3, generator_width=4)


def teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = resnet_cifar(5, 1, depth=8, width=4)
        with torch.no_grad():
            for _ in range(20):
                module(nn.functional.interpolate(torch.randn(16, 1, 4, 4), (16, 16), mode="bilinear"))
    return module.eval().requires_grad_(False)


def rounds(
    number: int, seed: int = 0, network: nn.Module | None = None, threads: Threads | None = None
) -> list[tuple[float, torch.Tensor]]:
    network = network or teacher()
    source = Source(
        network, Classification(5), (1, 16, 16), (0.5,), (0.25,), batchnorm_layers=tuple(batchnorm_layers(network))
    )
    compute = Compute(torch.device("cpu"), None, threads or Threads(1))
    made = synthesize(source, number, settings=SETTINGS, compute=compute, seed=seed)
    return [(progress.prior_loss, images) for progress, images in made]


def test_the_first_rounds_teach_the_generator_and_give_no_images() -> None:
    found = rounds(40)
    sizes = [len(images) for _, images in found]
    assert sizes == [0] * LEARNING_ROUNDS + [16, 16, 16]
    assert rounds_for(40, SETTINGS) == len(found)
    assert found[-1][1].dtype == torch.uint8
    assert found[-1][1].shape[1:] == (16, 16, 1)


def test_the_images_match_the_teacher_s_statistics_better_and_better() -> None:
    losses = [loss for loss, _ in rounds(16)]
    assert losses[-1] < 0.75 * losses[0]


def test_threads_are_chosen_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LEARNING_ROUNDS", 2)
    threads, looks = Threads(1), []
    threads.choose = lambda: looks.append(None)  # type: ignore[method-assign]
    assert len(rounds(16, threads=threads)) == len(looks) == 3


def test_the_same_seed_makes_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LEARNING_ROUNDS", 2)
    first, again, other = (torch.cat([images for _, images in rounds(16, seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_settings_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "LEARNING_ROUNDS", 1)
    before = dataclasses.asdict(SETTINGS)
    rounds(16)
    assert dataclasses.asdict(SETTINGS) == before


def test_a_loss_that_is_not_finite_stops_it() -> None:
    network = teacher()
    nn.init.constant_(network.get_submodule("linear").bias, math.nan)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match=r"loss is not finite in round 1: nan") as caught:
        rounds(16, network=network)
    assert "--std" in caught.value.hint
