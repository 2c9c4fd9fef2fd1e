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


def project(root: Path, *results: dict[str, object]) -> Path:
    """A project with two pages and these results, the file names in reverse order."""
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "docs").mkdir()
    for index, result in enumerate(results):
        (root / "benchmarks" / "results" / f"{9 - index}.json").write_text(json.dumps(result))
    (root / "README.md").write_text(
        "before\n<!-- results -->\nan old table\n<!-- /results -->\nafter\n<!-- int8 --><!-- /int8 -->\n"
    )
    (root / "docs" / "quantization.md").write_text(
        "<!-- int8 --><!-- /int8 -->\n<!-- int8-speed --><!-- /int8-speed -->\n"
    )
    (root / "docs" / "method.md").write_text("<!-- ablation --><!-- /ablation -->\nafter\n")
    return root


def test_results_are_means_and_deviations_over_the_seeds(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, CIFAR, DEMO))
    text = (tmp_path / "README.md").read_text()
    head, _, demo, cifar = [line for line in text.splitlines() if line.startswith("|")]
    assert head.split(" | ")[3] == "student accuracy"
    assert demo == (
        "| `ssdkd demo --seed N` | 3 | 90.00 % | **82.00 ± 1.00 %** | 91.1 ± 1.1 % | 174,778 → 75,002 "
        "| 0.500 → 0.260 ms | 150 s | 180 ± 10 s |"
    )
    assert cifar.startswith("| `ssdkd compress a.pt` | 1 | 90.00 % | **72.00 %** | 80.0 % |")
    assert (
        "- `ssdkd demo --seed N`: 2030-01-02, commit `abc1234`; cpu Some CPU, cores 2; python 3.11, torch 2.0." in text
    )
    assert text.startswith("before\n<!-- results -->\n\n| command")
    assert "\n\n<!-- /results -->\nafter\n" in text
    assert "an old table" not in text


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    run = measured(0, 80.0) | {"teacher_latency_ms": None, "seconds_total": None}
    tables.write_tables(project(tmp_path, {**DEMO, "runs": [run]}))
    assert "| – → 0.250 ms | 150 s | – |" in (tmp_path / "README.md").read_text()


def test_variants_are_compared_with_the_full_method(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, ABLATION, DEMO))
    rows = [line for line in (tmp_path / "docs" / "method.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| full | 2 | 81.00 ± 1.41 % | 89.0 ± 1.4 % | – | 51 ± 1 s |",
        "| without priorities | 1 | 79.50 % | 87.0 % | -1.50 points | 49 s |",
    ]


def test_int8_is_shown_by_what_its_ranges_come_from(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, INT8))
    row = "| some net | 90.00 % | 89.60 ± 0.14 % | 89.80 % | 85.00 % | 99.2 ± 0.4 % |"
    assert row in (tmp_path / "README.md").read_text().splitlines()
    rows = [line for line in (tmp_path / "docs" / "quantization.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2] == (
        "| some net | our samples | 2 | 90.00 % | 89.60 ± 0.14 % | 0.40 ± 0.14 | 99.25 ± 0.35 % | 100 % | 0.285 |"
    )
    assert len(rows) == 2 + 3


def test_int8_that_is_slower_is_shown_as_such(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, INT8_SPEED))
    text = (tmp_path / "docs" / "quantization.md").read_text()
    assert "| resnet8 | 75,290 | 0.200 | 0.100 | 3.000 | 4.000 | 2.00 | 0.75 |" in text


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    tables.write_tables(project(tmp_path, DEMO, ABLATION, INT8, INT8_SPEED))
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
    assert tables.filled(text, page, results) == text, "run `python benchmarks/tables.py`"
