"""What can only be seen on a GPU. Run it there with `pytest -n 0 -m gpu`, or this file alone where a package lacks."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import distill as loop
from engine import replay
from engine.alteration import alter, numbers_for
from engine.batchnorm import batchnorm_layers
from engine.channel_statistics import ChannelStatistics
from engine.config import settings_for
from engine.device import choose_device
from engine.distill import averaged_student, class_histogram, distill
from engine.errors import SSDKDError
from engine.features import Unexplained, standardised
from engine.recording import TIDIES_UP, alike
from engine.source import Source
from engine.stages import ALL, EIGHTH, QUARTER, Places
from engine.state import State, recordings, start
from engine.task import Classification
from engine.zoo import resnet_cifar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

CLASSES, CHANNELS, PIXELS = 10, 3, 32
DEVICE = "cuda"


@contextmanager
def waiting_for_the_device_fails() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def begin(device: str, *, student: nn.Module | None = None, **changed: Any) -> State:
    torch.manual_seed(0)
    teacher, usual = (resnet_cifar(CLASSES, CHANNELS, depth=8, width=8) for _ in range(2))
    student = student or usual
    with torch.no_grad():
        for _ in range(10):
            teacher(torch.randn(32, CHANNELS, PIXELS, PIXELS))
    image_shape = (CHANNELS, PIXELS, PIXELS)
    source = Source(
        teacher,
        Classification(CLASSES),
        image_shape,
        mean=(0.5,) * CHANNELS,
        std=(0.25,) * CHANNELS,
        batchnorm_layers=tuple(batchnorm_layers(teacher)),
    )
    changed = {"samples": 512, "student_steps": 5, "leaves": True, **changed}
    settings = settings_for("smoke", image_shape=image_shape, **changed)
    return start(source, student, settings=settings, compute=choose_device(device), seed=0)


def tensors_of(state: State) -> dict[str, Tensor]:
    """Every tensor that a run keeps between its rounds, by name."""
    found: dict[str, Tensor] = {}
    for name in ("teacher", "student", "average"):
        found |= {f"{name}.{key}": value for key, value in getattr(state, name).state_dict().items()}
    problem = state.inverter.problem
    for name, network in (("generator", state.inverter.generator), ("fast_generator", problem.fast_generator)):
        found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    for name, owner in (("buffer", state.buffer), ("held_out", state.held_out), ("prior", problem.prior)):
        values = vars(owner).items()
        found |= {f"{name}.{key}": value for key, value in values if isinstance(value, Tensor)}
    assert problem.spread is not None
    assert problem.leaves is not None
    found |= {"spread": problem.spread, "leaves": problem.leaves}
    found |= {"mean": state.normalization.mean, "std": state.normalization.std}
    for parameter, values in state.optimizer.state.items():
        found |= {f"optimizer.{id(parameter)}.{key}": value for key, value in values.items() if torch.is_tensor(value)}
    return found


@pytest.fixture(scope="module")
def finished() -> tuple[State, list[loop.RoundMetrics]]:
    """A smoke run on the GPU; tests may teach its student on."""
    state = begin("cuda")
    return state, list(distill(state))


def test_a_smoke_run_counts_and_keeps_the_shapes_of_a_run_on_the_cpu(
    finished: tuple[State, list[loop.RoundMetrics]],
) -> None:
    state, metrics = finished
    on_cpu = begin("cpu")
    cpu_metrics = list(distill(on_cpu))
    counted = ("round", "rounds", "phase", "images_seen", "steps", "buffer_size")
    for item, expected in zip(metrics, cpu_metrics, strict=True):
        assert [getattr(item, name) for name in counted] == [getattr(expected, name) for name in counted]
        assert 0 <= item.agreement <= 100
    shapes = [(tuple(value.shape), value.dtype) for value in tensors_of(state).values()]
    assert shapes == [(tuple(value.shape), value.dtype) for value in tensors_of(on_cpu).values()]
    assert sum(class_histogram(state)) == 512


def test_the_state_stays_on_the_device(finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    for name, value in tensors_of(finished[0]).items():
        assert value.device == torch.device("cuda", 0), name
    assert finished[0].rng.device.type == "cuda"


def test_the_kept_student_is_on_the_cpu_in_float32(finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    kept = averaged_student(finished[0])
    assert {value.device.type for value in kept.state_dict().values()} == {"cpu"}
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.float32}
    assert kept(torch.randn(2, CHANNELS, PIXELS, PIXELS)).shape == (2, CLASSES)


@pytest.mark.parametrize("progress", [0.3, 0.5])  # while maps are compared, where they are, and afterwards
def test_teaching_never_waits_for_the_device(progress: float, finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    state, _ = finished
    with waiting_for_the_device_fails():
        losses = loop.teach(state, progress)
    assert losses.device.type == "cuda"
    assert losses.isfinite().all()


def test_inverting_and_remembering_never_wait_for_the_device(
    finished: tuple[State, list[loop.RoundMetrics]],
) -> None:
    state, _ = finished
    with waiting_for_the_device_fails():
        images, losses = loop.synthesize(state, loop.choose_targets(state), 0.5)
        loop.remember(state, images, 0.5)
    assert images.device.type == "cuda"
    assert losses.total.isfinite()


# Recorded steps


def test_all_steps_are_replayed_after_a_smoke_run(finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    for name, step in recordings(finished[0]).items():
        assert step.replays, (name, step.refusal)


def test_without_cuda_graphs_every_kernel_is_launched_anew() -> None:
    state = begin("cuda", cuda_graphs=False)
    list(distill(state))
    assert not any(step.replays or step.refusal for step in recordings(state).values())


def test_a_replayed_step_gives_what_the_plain_call_gives(finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    state, _ = finished
    problem = state.inverter.problem
    for _ in range(3):  # of several batches: a graph that had kept the first would be noticed
        loop.draw(state, any_view=False)
        for step in state.gradients.values():
            expected = step.function()
            assert alike(step(), expected)
    state.student.eval()
    for asked, weight in ((False, 0.0), (True, 1.0), (True, 0.5)):
        problem.latent.detach().normal_(generator=state.rng)
        assert problem.leaves is not None
        problem.leaves.random_(256, generator=state.rng)
        problem.adversarial_weight.fill_(weight)
        problem.has_adversary[:3] = 0  # as it is where some are spared
        expected = state.inverter.inner_step[asked].function()
        assert alike(state.inverter.inner_step[asked](), expected)


def test_recorded_runs_learn_as_well_as_plain_ones(finished: tuple[State, list[loop.RoundMetrics]]) -> None:
    _, replayed = finished
    plain = list(distill(begin("cuda", cuda_graphs=False)))
    assert replayed[-1].prior_loss < 2 * plain[-1].prior_loss
    assert replayed[-1].distillation_loss < 2 * plain[-1].distillation_loss


class Stubborn(nn.Module):
    """A student that a graph cannot hold."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = resnet_cifar(CLASSES, CHANNELS, depth=8, width=8)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if self.how == "reads a value":
            return logits * (1.0 if logits.abs().max().item() >= 0 else 0.0)
        torch.cuda.synchronize()  # which no check but the recording itself notices
        return logits


def test_a_student_that_reads_a_value_is_taught_without_a_graph() -> None:
    state = begin("cuda", student=Stubborn("reads a value"))
    metrics = list(distill(state))
    assert all("cannot be recorded" in str(recordings(state)[name].refusal) for name in ("inversion", "teaching"))
    assert metrics[-1].distillation_loss < metrics[state.settings.warmup_rounds].distillation_loss


@pytest.mark.skipif(not TIDIES_UP, reason="a failed recording stops the run in this PyTorch: tested below")
def test_a_recording_that_fails_leaves_the_device_in_order() -> None:
    state = begin("cuda", student=Stubborn("synchronizes"))
    metrics = list(distill(state))
    assert recordings(state)["teaching"].refusal
    assert metrics[-1].distillation_loss < metrics[state.settings.warmup_rounds].distillation_loss
    assert torch.rand(3, device="cuda").isfinite().all()  # the device's own generator still works
    again = begin("cuda")
    list(distill(again))
    assert recordings(again)["teaching"].replays


@pytest.mark.skipif(TIDIES_UP, reason="this PyTorch goes on after a failed recording: tested above")
def test_a_recording_that_fails_stops_an_older_pytorch_and_says_what_to_type() -> None:
    with pytest.raises(SSDKDError, match="could not be recorded") as caught:
        list(distill(begin("cuda", student=Stubborn("synchronizes"))))
    assert "cuda_graphs = false" in caught.value.hint


def test_dropout_is_replayed_and_draws_anew() -> None:
    student = nn.Sequential(resnet_cifar(CLASSES, CHANNELS, depth=8, width=8), nn.Dropout(0.5))
    state = begin("cuda", student=student)
    list(distill(state))
    assert recordings(state)["teaching"].replays, recordings(state)["teaching"].refusal
    state.student.train()
    assert len({float(state.gradients[False]().losses[0]) for _ in range(4)}) == 4


def test_waiting_would_be_noticed() -> None:
    total = torch.ones(3, device="cuda").sum()
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_for_the_device_fails():
        total.item()


def test_products_are_computed_in_half_precision_and_weights_kept_in_float32(
    finished: tuple[State, list[loop.RoundMetrics]],
) -> None:
    state, _ = finished
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    assert state.compute.autocast_dtype == (None if expected == torch.float32 else expected)
    with torch.no_grad(), state.compute.autocast():
        logits = state.student(torch.randn(4, CHANNELS, PIXELS, PIXELS, device="cuda"))
    assert logits.dtype == expected
    assert {parameter.dtype for parameter in state.student.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_channel_statistics_and_their_gradient_are_those_of_var_mean(dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    features = (torch.randn(32, 6, 8, 8, device="cuda") * 2 + 1).to(dtype)
    if last:
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    exact = features.detach().float().requires_grad_()
    mean, variance = ChannelStatistics.apply(features, False)
    expected_variance, expected_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(mean, expected_mean, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(variance, expected_variance, atol=tolerance, rtol=tolerance)
    (gradient,) = torch.autograd.grad((mean.sin() + variance.square()).sum(), features)
    (expected,) = torch.autograd.grad((expected_mean.sin() + expected_variance.square()).sum(), exact)
    assert (gradient.float() - expected).norm() < 2 * tolerance * expected.norm()


def near(found: Tensor, expected: Tensor) -> bool:
    return bool(
        expected.norm() > 0 and (found.cpu().float() - expected.float()).norm() < 0.02 * expected.float().norm()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("places", [EIGHTH, QUARTER, ALL], ids=["an eighth", "a quarter", "all"])
def test_what_regressors_do_not_explain_is_as_on_a_cpu(
    places: Places, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    features = (3 * torch.randn(32, 12, 8, 8) + 1).to(dtype).contiguous(memory_format=layout)
    target = standardised(torch.randn(32, 9, 8, 8)[places])
    upstream, found = torch.rand(len(target)), {}
    for device in ("cpu", DEVICE):
        maps = features.clone().to(device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            errors = Unexplained.apply(maps, places, target.to(device))
        (gradient,) = torch.autograd.grad(errors, maps, upstream.to(device))
        assert gradient.dtype == dtype
        assert gradient.is_contiguous(memory_format=layout)
        found[device] = errors.detach(), gradient
    for on_gpu, on_cpu in zip(found[DEVICE], found["cpu"], strict=True):
        assert near(on_gpu, on_cpu)


def test_images_are_altered_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    images = torch.randn(9, CHANNELS, 16, 16).to(memory_format=torch.channels_last)
    numbers = torch.randn_like(numbers_for(9, CHANNELS, torch.device("cpu")))
    assert near(alter(images.to(DEVICE), numbers.to(DEVICE)), alter(images, numbers))


def test_buffer_follows_its_device() -> None:
    device, rng = torch.device("cuda", 0), torch.Generator("cuda").manual_seed(0)
    buffer = replay.empty_buffer(8, (1, 4, 4), views=1, classes=5, device=device)
    slots = replay.free_slots(buffer, 5, torch.zeros(0, device=device))
    images = torch.ones(5, 4, 4, 1, dtype=torch.uint8, device=device)
    views, logits = torch.zeros(5, 1, 3, dtype=torch.int64, device=device), torch.zeros(5, 1, 5, device=device)
    replay.add(buffer, slots, images, views, logits, torch.arange(5, device=device), torch.ones(5, device=device))
    drawn, weights = replay.sample(buffer, 20, beta=0.4, prioritized=True, rng=rng)
    assert drawn.device == weights.device == device
    assert drawn.bincount(minlength=5).tolist() == [4] * 5
    assert replay.class_counts(buffer, 5).tolist() == [1] * 5


def test_the_demo_runs_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssdkd_cli import timing
    from ssdkd_cli.main import main

    monkeypatch.setattr(timing, "BENCH_SECONDS", 0.02)
    config = tmp_path / "few.toml"
    # After three rounds a student says the same of nearly all images; one of two such runs failed.
    config.write_text("[distillation]\nrounds = 24\nwarmup_rounds = 4\nsamples = 1024\n")
    words = ["demo", "--device", "cuda", "--config", str(config), "--out", str(tmp_path / "run"), "--json"]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    assert code == 0, err.getvalue()
    report = json.loads(out.getvalue())
    assert report["environment"]["device"].startswith("cuda")
    assert report["environment"]["gpu"]
    assert report["distillation"]["rounds"] == 24
    assert report["artifacts"]
    assert all(artifact["verified"] for artifact in report["artifacts"])
    assert report["teacher"]["accuracy"] > 80
    assert (tmp_path / "run" / "model.onnx").stat().st_size > 0
