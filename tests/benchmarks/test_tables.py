import json
from pathlib import Path

import pytest

from benchmarks import tables

ABOUT = {
    "commit": "abc1234",
    "created": "2030-01-02",
    "machine": {"cpu": "Some CPU", "cores": 2, "gpu": None},
    "versions": {"python": "3.11", "torch": "2.0"},
}


def measured(seed: int, student_accuracy: float) -> dict[str, float]:
    return {
        "seed": seed,
        "teacher_accuracy": 90.0,
        "student_accuracy": student_accuracy,
        "ratio_percent": student_accuracy / 0.9,
        "seconds_total": 170.0 + 10 * seed,
        "distillation_seconds": 150.0,
        "teacher_parameters": 174778,
        "student_parameters": 75002,
        "teacher_latency_ms": 0.5,
        "student_latency_ms": 0.25 + 0.01 * seed,
    }


DEMO = {
    "kind": "demo",
    "command": "ssdkd demo --seed N",
    **ABOUT,
    "runs": [measured(0, 81.0), measured(1, 82.0), measured(2, 83.0)],
}
CIFAR = {"kind": "cifar", "command": "ssdkd compress a.pt", **ABOUT, "runs": [measured(0, 72.0)]}
ABLATION = {
    "kind": "ablation",
    "command": "python benchmarks/ablation.py",
    **ABOUT,
    "variants": [
        {
            "name": "full",
            "runs": [
                {"seed": 0, "student_accuracy": 80.0, "ratio_percent": 88.0, "seconds": 50.0},
                {"seed": 1, "student_accuracy": 82.0, "ratio_percent": 90.0, "seconds": 52.0},
            ],
        },
        {
            "name": "without priorities",
            "runs": [{"seed": 0, "student_accuracy": 79.5, "ratio_percent": 87.0, "seconds": 49.0}],
        },
    ],
}


def quantized(seed: int, calibration: str, accuracy: float) -> dict[str, object]:
    return {
        "network": "some net",
        "seed": seed,
        "calibration": calibration,
        "float_accuracy": 90.0,
        "accuracy": accuracy,
        "drop": 90.0 - accuracy,
        "agreement": 99.0 + seed / 2,
        "integer_share": 100.0,
        "size_ratio": 0.285,
    }


INT8 = {
    "kind": "int8",
    "command": "python -m benchmarks.int8",
    **ABOUT,
    "rows": [
        *(quantized(seed, "our samples", 89.5 + 0.2 * seed) for seed in (0, 1)),
        *(quantized(seed, "real images", 89.8) for seed in (0, 1)),
        *(quantized(seed, "noise", 85.0) for seed in (0, 1)),
    ],
}
INT8_SPEED = {
    "kind": "int8_speed",
    "command": "python -m benchmarks.int8_speed",
    **ABOUT,
    "rows": [
        {
            **{"network": "resnet8", "parameters": 75290, "runtime": "onnxruntime 1"},
            **{"fp32_ms_1": 0.2, "int8_ms_1": 0.1, "fp32_ms_32": 3.0, "int8_ms_32": 4.0},
            **{"times_faster_1": 2.0, "times_faster_32": 0.75},
        }
    ],
}


def race(method: str, seed: int, *points: tuple[float, float]) -> dict[str, object]:
    return {"method": method, "seed": seed, "teacher_accuracy": 90.0, "settings": {}, "points": points}


RACE = {
    "kind": "race",
    "command": "python -m benchmarks.cpu demo",
    **ABOUT,
    **{"task": "demo", "student": "wrn10_1", "seconds": 100.0},
    "runs": [
        race("ssdkd", 0, (5, 75.0), (10, 50.0), (20, 70.5), (100, 80.0)),
        race("ssdkd", 1, (10, 50.0), (20, 60.0), (30, 71.0), (100, 82.0)),
        race("fast-5", 0, (50, 75.0), (100, 69.0)),
        race("fast-5", 1, (50, 30.0), (100, 71.0)),
        race("fast-2", 0, (50, 30.0), (100, 59.9)),
        race("better", 0, (50, 30.0), (100, 81.0)),
    ],
}
STEP = {"pair": "demo", "batch": 64, "precision": "bfloat16", "engine_ms": 10.0, "bare_ms": 9.0}
STEPS = {
    **{"kind": "steps", "command": "python -m benchmarks.steps", **ABOUT},
    "rows": [
        {
            **{**STEP, "bare_without_teacher_ms": 8.0, "ratio_to_bare": 10 / 9},
            **{"ratio_to_bare_with_those": 1.2, "ratio_to_bare_without_teacher": 1.25},
        }
    ],
}
STEPS_WITH_MAPS = {**STEPS, "rows": [{**row, "ratio_with_maps_to_bare": 1.5} for row in STEPS["rows"]]}
BUFFER = {
    **{"kind": "buffer", "command": "python -m benchmarks.buffer", **ABOUT, "task": "cifar", "teacher_accuracy": 80.0},
    "runs": [
        {"samples": samples, "seed": seed, "accuracy": accuracy}
        for samples, seed, accuracy in ((5000, 0, 70.0), (5000, 1, 72.0), (500, 0, 69.0))
    ],
}
GPU_BUFFER = {
    **{"kind": "gpu_buffer", "command": "python -m benchmarks.gpu DATA --buffer 500 5000", **ABOUT},
    "runs": [
        {"samples": samples, "pair": "wrn40_2-wrn16_2", "teacher_accuracy": 90.0, "failed": failed}
        | ({} if failed else {"student_accuracy": accuracy})
        for samples, accuracy, failed in ((500, 81.0, None), (5000, 82.5, None), (5000, 0.0, "no memory"))
    ],
}
SETTINGS = {
    **{"kind": "settings", "command": "python -m benchmarks.settings demo", **ABOUT, "task": "demo"},
    "runs": [
        {"changed": changed, "rounds": 50, "seed": seed, "accuracy": accuracy, "agreement": 80.0}
        for changed, seed, accuracy in (
            *(({}, 0, 70.0), ({}, 1, 72.0)),
            *(({"gamma": 2.0}, 0, 71.0), ({"gamma": 2.0}, 1, 71.0), ({"beta": 0.0, "priority": False}, 1, 73.0)),
        )
    ],
}
CASE = {"samples": 500, "classes": 10, "pixels": 32, "teacher": "resnet20", "teacher_parameters": 269722, "batch": 64}
GROWTH = {
    **{"kind": "growth", "command": "python -m benchmarks.growth", **ABOUT},
    "rows": [
        {**CASE, "axis": axis, "seconds_per_round": 1.5, "seconds_per_1000_images": 1.2, "peak_memory_mb": 1234.5}
        for axis in ("samples", "classes", "pixels", "teacher")
    ],
}
GPU = {
    **{"kind": "gpu", "command": "python -m benchmarks.gpu DATA", **ABOUT},
    "summary": [
        {
            **{"pair": "wrn40_2-wrn16_2", "method": "ssdkd", "samples": 5000, "seeds": 2},
            **{"teacher_accuracy": 94.0, "teacher_accuracy_deviation": 0.0},
            **{"student_accuracy": 92.5, "student_accuracy_deviation": 0.70711},
            **{"ratio_percent": 98.4, "ratio_percent_deviation": 0.75, "seconds": 140.0, "seconds_deviation": None},
        }
    ],
}


def project(root: Path, *results: dict[str, object]) -> Path:
    """A project with two pages and these results, the file names in reverse order."""
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "docs").mkdir()
    for index, result in enumerate(results):
        (root / "benchmarks" / "results" / f"{9 - index}.json").write_text(json.dumps(result))
    (root / "README.md").write_text(
        "before\n<!-- results -->\nan old table\n<!-- /results -->\nafter\n"
        "<!-- int8 --><!-- /int8 -->\n<!-- race --><!-- /race -->\n<!-- gpu --><!-- /gpu -->\n"
    )
    (root / "docs" / "quantization.md").write_text(
        "<!-- int8 --><!-- /int8 -->\n<!-- int8-speed --><!-- /int8-speed -->\n"
    )
    (root / "docs" / "benchmarks.md").write_text(
        "".join(
            f"<!-- {marker} --><!-- /{marker} -->\n"
            for marker in ("results", "race", "steps", "buffer", "settings", "growth", "gpu", "gpu-latency")
        )
    )
    (root / "docs" / "method.md").write_text("<!-- ablation --><!-- /ablation -->\nafter\n")
    return root


def test_latencies_are_shown_and_what_was_not_run_says_why() -> None:
    about = {"kind": "gpu_latency", "command": "python -m benchmarks.gpu_latency", **ABOUT}
    rows = [
        {"network": "net", "batch": 64, "runtime": "torch", "latency_ms": {"p50": 0.5, "p90": 0.625, "p99": 2.0}},
        *({"network": name, "batch": 1, "runtime": "TensorRT", "not_run": "it is not installed"} for name in "ab"),
    ]
    lines = tables.latency_table([{**about, "rows": rows}])
    assert lines[2:5] == [
        "| net | 64 | torch | 0.50 | 0.62 | 2.00 |",
        "",
        "- Not run by us, TensorRT: it is not installed.",
    ]
    assert "gpu_latency" in lines[5]
    assert len(lines) == 6


def test_results_are_means_and_deviations_over_the_seeds(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, CIFAR, DEMO))
    full = (tmp_path / "docs" / "benchmarks.md").read_text()
    head, _, demo, cifar = [line for line in full.splitlines() if line.startswith("|")]
    assert head.split(" | ")[4] == "student accuracy"
    assert demo == (
        "| `ssdkd demo --seed N` | Some CPU | 3 | 90.00 % | **82.00 ± 1.00 %** | 91.1 ± 1.1 % | 174,778 → 75,002 "
        "| 0.500 → 0.260 ms | 150 s | 180 ± 10 s |"
    )
    assert cifar.startswith("| `ssdkd compress a.pt` | Some CPU | 1 | 90.00 % | **72.00 %** | 80.0 % |")
    said = "- `ssdkd demo --seed N`: 2030-01-02, commit `abc1234`; cpu Some CPU, cores 2; python 3.11, torch 2.0."
    assert said in full.splitlines()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n\n| command")
    assert "\n\n<!-- /results -->\nafter\n" in text
    assert "an old table" not in text


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    run = measured(0, 80.0) | {"teacher_latency_ms": None, "seconds_total": None}
    tables.write_tables(project(tmp_path, {**DEMO, "runs": [run]}))
    assert "| – → 0.250 ms | 150 s | – | 2030-01-02, `abc1234`, Some CPU |" in (tmp_path / "README.md").read_text()


def test_the_readme_has_the_newest_of_each_and_the_docs_have_all(tmp_path: Path) -> None:
    later = {**DEMO, "created": "2031-01-01", "runs": [measured(0, 70.0)]}
    another = {**DEMO, "machine": {"cpu": "Another", "instructions": "avx512_bf16"}, "created": "2029-01-01"}
    tables.write_tables(project(tmp_path, DEMO, later, another, CIFAR))
    rows = [row.split(" | ") for row in rows_of(tmp_path / "README.md")]
    assert [(row[0], row[3], row[-1]) for row in rows] == [
        ("| `ssdkd demo --seed N`", "**70.00 %**", "2031-01-01, `abc1234`, Some CPU |"),
        ("| `ssdkd compress a.pt`", "**72.00 %**", "2030-01-02, `abc1234`, Some CPU |"),
    ]
    assert len(rows_of(tmp_path / "docs" / "benchmarks.md")) == 4


def test_the_readme_shows_ours_beside_the_best_peer_and_without_the_method(tmp_path: Path) -> None:
    off = race("SSD-KD off", 0, (50, 30.0), (100, 55.0))
    tables.write_tables(project(tmp_path, {**RACE, "runs": [*RACE["runs"], off]}))
    assert rows_of(tmp_path / "README.md") == [
        "| demo, wrn10_1 | 100 | 2 | **81.0 ± 1.4 %** | 55.0 % | not claimed: it ends below 60 % "
        "| fast-5: 70.0 ± 1.4 % | 1/4.0 of its time, 25 ± 7 s | 2030-01-02, `abc1234`, Some CPU |"
    ]


@pytest.mark.parametrize(
    ("peer", "shown"), [({}, "not run"), ({"method": "nayer", "student_accuracy": 72.8}, "nayer: 72.80 %")]
)
def test_the_readme_shows_a_gpu_s_pair_beside_the_best_peer(
    peer: dict[str, object], shown: str, tmp_path: Path
) -> None:
    (ours,) = GPU["summary"]
    rows = [ours, *([{**ours, **peer, "student_accuracy_deviation": None}] if peer else [])]
    tables.write_tables(project(tmp_path, {**GPU, "summary": rows, "machine": {"cpu": "a", "gpu": "NVIDIA H200"}}))
    assert rows_of(tmp_path / "README.md") == [
        f"| wrn40_2-wrn16_2 | 140 | 2 | 94.00 % | **92.50 ± 0.71 %** | {shown} | 98.4 ± 0.8 % "
        "| 2030-01-02, `abc1234`, NVIDIA H200 |"
    ]


def test_variants_are_compared_with_the_full_method(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, ABLATION, DEMO))
    rows = [line for line in (tmp_path / "docs" / "method.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| full | 2 | 81.00 ± 1.41 % | 89.0 ± 1.4 % | – | 51 ± 1 s |",
        "| without priorities | 1 | 79.50 % | 87.0 % | -1.50 points | 49 s |",
    ]


def test_int8_is_shown_by_what_its_ranges_come_from(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, INT8))
    assert rows_of(tmp_path / "README.md") == [
        "| some net | 2 | 90.00 % | 89.60 ± 0.14 % | 89.80 % | 85.00 % | 99.2 ± 0.4 % "
        "| 2030-01-02, `abc1234`, Some CPU |"
    ]
    rows = [line for line in (tmp_path / "docs" / "quantization.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2] == (
        "| some net | our samples | 2 | 90.00 % | 89.60 ± 0.14 % | 0.40 ± 0.14 | 99.25 ± 0.35 % | 100 % | 0.285 |"
    )
    assert len(rows) == 2 + 3


def test_int8_that_is_slower_is_shown_as_such(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, INT8_SPEED))
    text = (tmp_path / "docs" / "quantization.md").read_text()
    assert "| resnet8 | 75,290 | 0.200 | 0.100 | 3.000 | 4.000 | 2.00 | 0.75 |" in text


def rows_of(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("|") and "---" not in line][1:]


def test_a_rival_is_reached_at_the_accuracy_where_it_ends_and_not_at_its_best(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, RACE))
    assert rows_of(tmp_path / "docs" / "benchmarks.md") == [
        "| ssdkd | 2 | 100 s | **81.00 ± 1.41 %** | – |",
        "| fast-5 | 2 | 100 s | 70.00 ± 1.41 % | 1/4.0 of its time, 25 ± 7 s |",
        "| fast-2 | 1 | 100 s | 59.90 % | not claimed: it ends below 60 % |",
        "| better | 1 | 100 s | 81.00 % | not reached by 1 of 2 seeds |",
    ]
    assert (
        "**demo, to wrn10_1, 100 s each** (teacher 90.00 %; Some CPU):"
        in (tmp_path / "docs" / "benchmarks.md").read_text()
    )


@pytest.mark.parametrize(
    ("result", "row"),
    [
        (STEPS, "| demo | 64 | bfloat16 | 10.00 | – | 9.00 | 8.00 | 90 % | 83 % | 80 % | – | – |"),
        (
            STEPS_WITH_MAPS,
            "| demo | 64 | bfloat16 | 10.00 | – | 9.00 | 8.00 | 90 % | 83 % | 80 % | 67 % | 74 % |",
        ),  # on a CPU half of the steps have maps: 1.2 and 1.5
        (BUFFER, "| 500 | 1 | 69.00 % | 86.2 % | -2.00 points |"),
        (GPU_BUFFER, "| 500 | 1 | 81.00 % | 90.0 % | -1.50 points |"),
        (GPU_BUFFER, "| 5,000 | 1 | 82.50 % | 91.7 % | – |"),
        (SETTINGS, "| nothing | 2 | 71.00 ± 1.41 % | – | – | 80.0 % |"),
        (SETTINGS, "| gamma 2.0 | 2 | 71.00 % | 0.00 ± 1.41 points | 1 of 2 | 80.0 % |"),
        (SETTINGS, "| beta 0.0, priority False | 1 | 73.00 % | 1.00 points | 1 of 1 | 80.0 % |"),
        (GROWTH, "| buffer, samples | 500 | 64 | 1.50 | 1.20 | 1,234 |"),
        (GROWTH, "| teacher | resnet20 (269,722) | 64 | 1.50 | 1.20 | 1,234 |"),
    ],
)
def test_rows_of_the_other_benchmarks(tmp_path: Path, result: dict[str, object], row: str) -> None:
    tables.write_tables(project(tmp_path, result))
    assert row in rows_of(tmp_path / "docs" / "benchmarks.md")


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    results = DEMO, ABLATION, INT8, INT8_SPEED, RACE, STEPS, BUFFER, GPU_BUFFER, SETTINGS, GROWTH, GPU
    tables.write_tables(project(tmp_path, *results))
    pages = [tmp_path / "README.md", *(tmp_path / "docs").iterdir()]
    once = [page.read_text() for page in pages]
    tables.write_tables(tmp_path)
    assert [page.read_text() for page in pages] == once


def test_without_results_there_is_no_table(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    assert "|" not in text


def test_a_page_without_markers_is_named(tmp_path: Path) -> None:
    project(tmp_path, DEMO)
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match=r"README\.md: expected <!-- results -->"):
        tables.write_tables(tmp_path)
    assert (tmp_path / "README.md").read_text() == "no markers"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: f"{page.path}-{page.marker}")
def test_the_committed_pages_show_the_committed_results(page: tables.Page) -> None:
    text = (tables.ROOT / page.path).read_text(encoding="utf-8")
    results = list(tables.read_results(tables.ROOT / "benchmarks" / "results"))
    assert tables.filled(text, page, results) == text, "run `python -m benchmarks.tables`"


def test_what_a_gpu_measured_is_shown_with_its_deviations(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, GPU))
    assert rows_of(tmp_path / "docs" / "benchmarks.md") == [
        "| wrn40_2-wrn16_2 | ssdkd | 5,000 | 2 | 94.00 % | 92.50 ± 0.71 % | 98.4 ± 0.8 % | 140 s |"
    ]
