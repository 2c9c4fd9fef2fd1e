import contextlib
import dataclasses

import pytest

from engine.errors import SSDKDError
from exporters.to_tensorrt import Flavour
from ssdkd_cli import environment
from ssdkd_cli.gates import Limits, check_limits, decide, gate_line, has_failed, judge, recommend, with_budget
from ssdkd_cli.report import Artifact, Percentiles
from ssdkd_cli.target import Target, resolve_target


def artifact(path: str, precision: str = "fp32", **changed: object) -> Artifact:
    values: dict[str, object] = {
        "path": path,
        "sha256": "ab",
        "format": "onnx",
        "precision": precision,
        "precision_requested": precision,
        "profile": None,
        "size_bytes": 2_000_000,
        "runtime": "onnxruntime",
        "max_abs_error": 0.0,
        "agreement": 100.0,
        "accuracy": 80.0,
        "latency_ms": Percentiles(p50=2.0, p90=3.0, p99=4.0),
        "throughput_per_s": 100.0,
        "batch": 32,
        "verified": True,
        "verified_reason": "",
        "notes": (),
        "teacher_agreement": 70.0,
    }
    return Artifact(**{**values, **changed})  # type: ignore[arg-type]


def fast(ms: float) -> Percentiles:
    return Percentiles(p50=ms, p90=ms, p99=ms)


def target(**changed: object) -> Target:
    values: dict[str, object] = {"formats": (), "precisions": (), "profile": None, "qat": "auto", "fallback": True}
    return resolve_target(**{**values, **changed})  # type: ignore[arg-type]


ANY, OF_INT8, JETSON = target(), target(precisions=["int8"]), target(profile="jetson-orin")
SLOW = artifact("model.onnx")
QUICK = artifact("model.int8.onnx", "int8", latency_ms=fast(1.0), size_bytes=500_000, accuracy=78.0)


@pytest.mark.parametrize(
    ("limits", "value", "passed"),
    [
        (Limits(max_drop=5.0), 10.0, False),
        (Limits(max_drop=10.0), 10.0, True),
        (Limits(max_latency_ms=2.0), 2.0, True),
        (Limits(max_latency_ms=1.9), 2.0, False),
        (Limits(max_size_mb=2.0), 2.0, True),
        (Limits(max_size_mb=1.99), 2.0, False),
        (Limits(min_agreement=70.0), 70.0, True),
        (Limits(min_agreement=70.1), 70.0, False),
    ],
)
def test_each_limit_is_compared_with_its_own_value(limits: Limits, value: float, passed: bool) -> None:
    (gate,) = judge(limits, SLOW, teacher_accuracy=90.0)
    assert (gate.value, gate.passed, gate.artifact) == (value, passed, "model.onnx")
    assert getattr(limits, gate.name) == gate.limit


@pytest.mark.parametrize(
    ("limits", "changed"),
    [
        (Limits(max_drop=5.0), {"accuracy": None}),
        (Limits(max_latency_ms=5.0), {"latency_ms": None}),
        (Limits(min_agreement=5.0), {"teacher_agreement": None}),
    ],
)
def test_what_was_not_measured_has_not_passed(limits: Limits, changed: dict[str, None]) -> None:
    (gate,) = judge(limits, artifact("model.onnx", **changed), teacher_accuracy=90.0)
    assert (gate.value, gate.passed) == (None, False)


def test_a_difference_that_is_rounded_meets_its_limit() -> None:
    accuracy, of_teacher = 63.4, 64.4
    assert of_teacher - accuracy > 1  # by the last bit
    (gate,) = judge(Limits(max_drop=1.0), artifact("model.onnx", accuracy=accuracy), teacher_accuracy=of_teacher)
    assert gate.passed


def test_no_limit_no_gate() -> None:
    assert judge(Limits(), SLOW, teacher_accuracy=None) == []


def test_the_fastest_verified_file_is_recommended() -> None:
    broken = artifact("model.fp16.onnx", "fp16", latency_ms=fast(0.1), verified=False)
    elsewhere = artifact("model.engine", verified=None, latency_ms=None)
    passing, gates = decide(Limits(), (SLOW, QUICK, broken, elsewhere), ANY, 90.0)
    assert [item.path for item in passing] == ["model.int8.onnx", "model.onnx"]
    assert gates == ()
    recommendation = recommend(passing, 4.0, ANY)
    assert recommendation is not None
    assert recommendation.artifact == "model.int8.onnx"
    assert recommendation.why == (
        "the fastest of 2 files that pass; it has 78.0 % accuracy; "
        "it predicts the teacher's class on 70.0 % of held-out samples; "
        "on this machine 4.0 times faster than the teacher; model.onnx takes 2.0 times as long"
    )
    assert recommend(decide(Limits(), (broken, elsewhere), ANY, None)[0], None, ANY) is None


@pytest.mark.parametrize(
    ("teacher_ms", "words"),
    [
        (0.5, "4.0 times slower than the teacher"),
        (2.05, "about as fast as the teacher"),
        (6.0, "3.0 times faster than"),
    ],
)
def test_the_speed_beside_the_teacher_s_is_named_by_its_direction(teacher_ms: float, words: str) -> None:
    recommendation = recommend([SLOW], teacher_ms, ANY)
    assert recommendation is not None
    assert words in recommendation.why


@pytest.mark.parametrize(("agreement", "said"), [(9.96, "class on 10.0 % of held-out samples"), (None, "")])
def test_what_is_recommended_is_recommended_with_its_agreement(agreement: float | None, said: str) -> None:
    recommendation = recommend([dataclasses.replace(SLOW, teacher_agreement=agreement)], 4.0, ANY)
    assert recommendation is not None
    assert said in recommendation.why
    assert ("held-out" in recommendation.why) is bool(said)


def test_a_slower_precision_is_said_to_be_slower() -> None:
    lame = artifact("model.int8.onnx", "int8", latency_ms=fast(5.0))
    recommendation = recommend(decide(Limits(), (SLOW, lame), ANY, None)[0], None, ANY)
    assert recommendation is not None
    assert recommendation.artifact == "model.onnx"
    assert "model.int8.onnx takes 2.5 times as long" in recommendation.why


DOUBT = "it loses 1.56 points of agreement with the teacher, 0.78 may be lost, which on 128 samples may be chance"


@pytest.fixture
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2, and no VNNI."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(environment, "cpu_profile", lambda: ("x86-avx2", "AVX2, no VNNI"))


LAME = artifact("model.int8.onnx", "int8", latency_ms=fast(5.0))


@pytest.mark.parametrize("profile", ["arm64", "x86-vnni"])
@pytest.mark.usefixtures("on_x86")
def test_what_is_slow_here_is_not_judged_by_that_for_another_device(profile: str) -> None:
    there = target(profile=profile)
    recommendation = recommend(decide(Limits(), (SLOW, LAME), there, None)[0], 1.0, there)
    assert recommendation is not None
    assert recommendation.artifact == "model.int8.onnx"  # what that profile asks for
    assert recommendation.why.startswith(f"of 2 files that pass the one in int8, which {profile} runs fastest; ")
    assert recommendation.why.endswith(f"; how fast it is on {profile}, `ssdkd bench model.int8.onnx` says there")
    assert "times" not in recommendation.why


def test_on_the_device_itself_what_is_slow_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("aarch64", "arm64"):  # of Linux and of macOS
        monkeypatch.setattr("platform.machine", lambda name=name: name)
        at_home = target(profile="arm64")
        recommendation = recommend(decide(Limits(), (SLOW, LAME), at_home, None)[0], 1.0, at_home)
        assert recommendation is not None
        assert recommendation.artifact == "model.onnx"
        assert recommendation.why.endswith("; model.int8.onnx takes 2.5 times as long")


@pytest.mark.usefixtures("on_x86")
def test_of_another_device_a_doubtful_file_is_named_and_the_order_is_that_of_the_words() -> None:
    half = artifact("model.fp16.onnx", "fp16", latency_ms=fast(0.1))
    doubtful, both = dataclasses.replace(LAME, doubt=DOUBT), target(profile="arm64", precisions=["fp16", "int8"])
    recommendation = recommend(decide(Limits(), (SLOW, half, doubtful), both, None)[0], None, both)
    assert recommendation is not None
    assert recommendation.artifact == "model.fp16.onnx"  # asked for, as float32 was not
    assert f"; model.int8.onnx is in doubt: {DOUBT}; " in recommendation.why
    assert decide(Limits(), (half, LAME), both, None)[0] == [LAME, half]  # the profile's own precision


@pytest.mark.usefixtures("on_x86")
def test_a_latency_that_says_nothing_of_the_device_is_no_limit() -> None:
    with pytest.raises(SSDKDError, match="cannot be judged here: the profile arm64 is of another kind of processor"):
        check_limits(Limits(max_latency_ms=2.0), target(profile="arm64"), has_labels=False)
    check_limits(Limits(max_latency_ms=2.0), target(profile="x86-avx2"), has_labels=False)


def test_a_file_in_doubt_is_recommended_only_where_no_other_passes() -> None:
    doubtful = dataclasses.replace(QUICK, doubt=DOUBT)
    passing, _ = decide(Limits(), (doubtful, SLOW), ANY, None)
    recommendation = recommend(passing, None, ANY)
    assert recommendation is not None
    assert recommendation.artifact == "model.onnx"
    assert recommendation.why.startswith("the only file that passes without doubt; ")
    assert recommendation.why.endswith(f"; model.int8.onnx is 2.0 times faster, but {DOUBT}")
    lame = dataclasses.replace(doubtful, latency_ms=fast(9.0))
    recommendation = recommend(decide(Limits(), (lame, SLOW), ANY, None)[0], None, ANY)
    assert recommendation is not None
    assert recommendation.why.endswith("; model.int8.onnx takes 4.5 times as long")
    half = artifact("model.fp16.onnx", "fp16", latency_ms=fast(2.04))
    passing, _ = decide(Limits(), (doubtful, half, SLOW), ANY, None)
    recommendation = recommend(passing, None, ANY)
    assert recommendation is not None
    assert recommendation.why.startswith("the fastest of 2 files that pass without doubt; ")
    assert "; model.fp16.onnx takes about as long; " in recommendation.why  # and not 1.0 times as long
    alone = recommend([doubtful], None, ANY)
    assert alone is not None
    assert alone.why.startswith(f"the only file that is verified and passes; {DOUBT}; ")


def test_a_fast_file_that_breaks_a_limit_is_not_recommended() -> None:
    passing, gates = decide(Limits(max_drop=11.0), (SLOW, QUICK), ANY, 90.0)
    assert [item.path for item in passing] == ["model.onnx"]
    assert [(gate.artifact, gate.passed) for gate in gates] == [("model.onnx", True)]


def test_what_was_asked_for_is_judged_whatever_else_passes() -> None:
    _, gates = decide(Limits(max_drop=11.0), (SLOW, QUICK), OF_INT8, 90.0)
    assert [(gate.artifact, gate.value, gate.passed) for gate in gates] == [("model.int8.onnx", 12.0, False)]


def test_where_nothing_passes_the_fastest_file_says_why() -> None:
    passing, gates = decide(Limits(max_latency_ms=0.5, max_size_mb=1.0), (SLOW, QUICK), ANY, None)
    assert passing == []
    assert [(gate.name, gate.artifact, gate.passed) for gate in gates] == [
        ("max_latency_ms", "model.int8.onnx", False),
        ("max_size_mb", "model.int8.onnx", True),
    ]


def test_of_a_file_that_cannot_run_here_only_the_size_is_judged() -> None:
    plan = artifact("model.engine", format="trt", verified=None, latency_ms=None, accuracy=None, teacher_agreement=None)
    everything = Limits(max_drop=1.0, max_latency_ms=1.0, max_size_mb=1.0, min_agreement=1.0)
    assert [(gate.name, gate.passed) for gate in judge(everything, plan, 90.0)] == [("max_size_mb", False)]


def test_a_device_s_files_are_recommended_for_it_alone() -> None:
    passing, _ = decide(Limits(), (SLOW, QUICK), JETSON, None)
    assert passing == []  # what is fast on this processor says nothing of a Jetson


def test_the_latency_of_a_plan_s_source_on_the_cpu_is_not_judged() -> None:
    graph = artifact("model.fp16.onnx", "fp16")
    plan = artifact("model.fp16.engine", "fp16", format="trt", latency_ms=fast(0.1))
    passing, gates = decide(Limits(max_latency_ms=1.0, max_size_mb=9.0), (graph, plan), JETSON, None)
    assert [item.path for item in passing] == ["model.fp16.engine"]
    assert [(gate.name, gate.artifact, gate.passed) for gate in gates] == [
        ("max_size_mb", "model.fp16.onnx", True),
        ("max_latency_ms", "model.fp16.engine", True),
        ("max_size_mb", "model.fp16.engine", True),
    ]


@pytest.mark.parametrize(("verified", "limit", "failed"), [(True, 9.0, False), (None, 9.0, False), (False, 9.0, True)])
def test_what_has_failed(verified: bool | None, limit: float, failed: bool) -> None:
    item = artifact("model.onnx", verified=verified)
    assert has_failed([item], judge(Limits(max_size_mb=limit), item, None)) is failed
    assert has_failed([item], judge(Limits(max_size_mb=1.0), item, None))


@pytest.mark.parametrize("problem", [None, "a plan cannot be loaded by TensorRT for RTX on an H200"])
def test_limits_of_a_plan_are_judged_where_its_library_runs(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def why(flavour: Flavour) -> str | None:
        asked.append(flavour.name)
        return problem

    monkeypatch.setattr("exporters.tensorrt_runtime.why_plans_do_not_run", why)
    plans = dataclasses.replace(JETSON, formats=("trt",), flavour=Flavour("tensorrt_rtx", "TensorRT for RTX", "1.7"))
    for limits in (Limits(max_latency_ms=1.0, min_agreement=1.0), Limits(min_agreement=1.0)):
        refused = pytest.raises(SSDKDError, match=f"cannot be judged here: .*: {problem}$")
        with refused if problem else contextlib.nullcontext():
            check_limits(limits, plans, has_labels=False)
    assert asked == ["tensorrt_rtx"] * 2  # once each
    check_limits(Limits(max_size_mb=1.0), plans, has_labels=False)  # is judged of a plan that does not run
    assert len(asked) == 2


def test_limits_that_cannot_be_judged_are_errors_before_the_run() -> None:
    with pytest.raises(SSDKDError, match="--max-drop compares accuracies") as caught:
        check_limits(Limits(max_drop=1.0), ANY, has_labels=False)
    assert "--eval-data" in caught.value.hint
    of_profile = dataclasses.replace(JETSON, formats=("onnx",))  # --profile jetson-orin --export onnx
    of_format = dataclasses.replace(JETSON, is_named=False)
    itself, none = "the device builds its plan itself", "no plan is made of them here"
    for wanted, why, leave_out in (
        (JETSON, itself, "--profile jetson-orin and --export trt"),
        (of_profile, none, "--profile jetson-orin"),
        (of_format, itself, "--export trt"),
    ):
        with pytest.raises(
            SSDKDError, match=f"--max-latency-ms cannot be judged here: .* cannot be run: {why}$"
        ) as caught:
            check_limits(Limits(max_latency_ms=1.0), wanted, has_labels=True)
        assert caught.value.hint is not None
        assert caught.value.hint.endswith(f"are made without {leave_out}")
    plans_alone = dataclasses.replace(JETSON, formats=("trt",))
    with pytest.raises(SSDKDError, match="--max-drop and --min-agreement cannot be judged here") as caught:
        check_limits(Limits(max_drop=1.0, min_agreement=1.0), plans_alone, has_labels=True)
    assert "--export onnx" in caught.value.hint
    with pytest.raises(SSDKDError, match="--max-size-mb cannot be judged here"):
        check_limits(Limits(max_size_mb=1.0), plans_alone, has_labels=False)
    check_limits(Limits(max_size_mb=1.0), JETSON, has_labels=False)  # of the ONNX file beside the script
    check_limits(Limits(max_size_mb=1.0, min_agreement=1.0), ANY, has_labels=False)


def test_a_gate_in_words() -> None:
    gates = judge(Limits(max_size_mb=0.5, max_drop=1.0), artifact("model.onnx", accuracy=None), 90.0)
    assert [gate_line(gate) for gate in gates] == [
        "--max-drop 1: model.onnx could not be measured",
        "--max-size-mb 0.5: model.onnx has 2 MB",
    ]
    gates = judge(Limits(max_drop=9, max_latency_ms=3, min_agreement=60), artifact("model.onnx"), 90.0)
    assert [gate_line(gate).partition(" has ")[2] for gate in gates] == [
        "10 points less than the teacher",
        "2 ms",
        "70 %",
    ]


def test_a_budget_of_a_profile_is_told_from_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    profile = target(profile="x86-avx2")
    (typed,) = judge(with_budget(Limits(max_latency_ms=5), profile), SLOW, None)
    (budget,) = judge(with_budget(Limits(), profile), SLOW, None)
    assert (typed.limit, gate_line(typed)) == (5, "--max-latency-ms 5: model.onnx has 2 ms")
    assert budget.budget_of == "x86-avx2"
    assert gate_line(budget) == "--max-latency-ms 33.3 (budget of the profile x86-avx2): model.onnx has 2 ms"
    assert with_budget(Limits(), ANY) == Limits()
