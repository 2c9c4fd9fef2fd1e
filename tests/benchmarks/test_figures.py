from pathlib import Path

import pytest

from benchmarks.figures import draw, mean_curve

RUNS = [
    {"method": method, "seed": seed, "points": [[10.0, 50.0 + seed], [20.0, 60.0 + seed]]}
    for method in ("ssdkd", "fast-5")
    for seed in (0, 1)
]
RACE = {"kind": "race", "task": "demo", "student": "resnet8", "machine": {"cpu": "Some CPU"}, "runs": RUNS}
QUICK_RACE = {**RACE, "machine": {"cpu": "Some CPU", "instructions": "avx2 avx512_bf16"}}
BUFFER = {
    "kind": "buffer",
    "task": "cifar",
    "teacher_accuracy": 80.0,
    "runs": [{"samples": samples, "accuracy": 70.0} for samples in (500, 5000)],
}
GPU_BUFFER = {
    "kind": "gpu_buffer",
    "runs": [
        {"samples": samples, "pair": "a-b", "teacher_accuracy": 90.0, "failed": None, "student_accuracy": 70.0}
        for samples in (500, 5000)
    ],
}
CASE = {"samples": 500, "classes": 10, "pixels": 32, "teacher_parameters": 1000}
GROWTH = {
    "kind": "growth",
    "device": "cpu",
    "rows": [
        {**CASE, "axis": axis, "seconds_per_1000_images": 1.0, "peak_memory_mb": 500.0}
        for axis in ("samples", "classes", "pixels", "teacher")
    ],
}


def test_a_figure_a_result_named_by_what_it_shows_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    results = [RACE, QUICK_RACE, {"kind": "demo"}, BUFFER, GPU_BUFFER, GROWTH]
    drawn = draw(results, tmp_path / "one")
    assert [path.name for path in drawn] == [
        *(
            "race_demo_some.svg",
            "race_demo_some_bfloat16.svg",
            "buffer_cifar.svg",
            "gpu_buffer_a-b.svg",
            "growth_cpu.svg",
        )
    ]
    text = drawn[0].read_text()
    assert all(f">{word}<" in text for word in ("ssdkd", "fast-5", "student accuracy, %", "seconds"))
    again = draw(results, tmp_path / "two")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn]


def test_the_mean_of_curves_of_different_length_ends_where_their_ends_do() -> None:
    seconds, means = mean_curve([[(10.0, 50.0), (20.0, 60.0)], [(5.0, 40.0), (15.0, 50.0), (21.0, 70.0)]])
    assert (seconds[0], seconds[-1]) == (10.0, 21.0)
    assert means[0] == pytest.approx((50 + 45) / 2)
    assert means[-1] == pytest.approx((60 + 70) / 2)


def test_a_gpus_curves_are_drawn_a_pair_and_a_method(tmp_path: Path) -> None:
    run = {
        **{"pair": "wrn40_2-wrn16_2", "method": "ssdkd", "samples": 5000, "failed": None},
        "curve": [{"seconds": 0.0, "accuracy": 10.0}, {"seconds": 60.0, "accuracy": 90.0}],
    }
    runs = [run, run | {"method": "fast-5"}, run | {"method": "nayer", "failed": "no kornia"}]
    (path,) = draw([{"kind": "gpu", "runs": runs}, {"kind": "gpu", "runs": runs[2:]}], tmp_path)
    assert path.name == "gpu_wrn40_2-wrn16_2_ssdkd_fast-5_5000.svg"
    text = path.read_text()
    assert all(f">{words}<" in text for words in ("wrn40_2-wrn16_2", "ssdkd, 5,000 samples", "fast-5"))
    assert "nayer" not in text  # it failed
