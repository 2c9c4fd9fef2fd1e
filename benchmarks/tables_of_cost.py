"""Tables of what things cost: latencies, steps, rounds."""

from collections.abc import Sequence

from benchmarks.markdown import UNKNOWN, Result, markdown, provenance
from engine.config import GPU_DEFAULTS, DistillationSettings

INT8_SPEED_HEAD = (
    *("network", "parameters", "FP32, 1 image, ms", "INT8", "FP32, 32 images, ms", "INT8"),
    *("times faster, 1", "times faster, 32"),
)
STEPS_HEAD = (
    *("pair", "batch", "precision", "the engine's step, ms", "not as a CUDA graph", "bare step, ms"),
    "without teacher, ms",
    *("throughput, of the bare step's", "the teacher's looks counted in", "of the one without teacher"),
    *("with maps, of the bare step's", "over a whole run"),
)
STEP_RATIOS = ("ratio_to_bare", "ratio_to_bare_with_those", "ratio_to_bare_without_teacher", "ratio_with_maps_to_bare")
WHOLE_RUN = "ratio_over_a_whole_run"
LATENCY_HEAD = ("network", "images", "runtime", "p50, ms", "p90", "p99")
GROWTH_NAMES = {"samples": "buffer, samples", "classes": "classes", "pixels": "pixels a side", "teacher": "teacher"}
GROWTH_HEAD = (
    "what varies",
    "value",
    "batch",
    "s a round",
    "s for 1,000 images that the student sees",
    "peak memory, MB",
)


def int8_speed_table(results: Sequence[Result]) -> list[str]:
    """A row a network, how many times faster INT8 is; the kind `int8_speed`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["network"],
                f"{row['parameters']:,}",
                *(f"{row[f'{precision}_ms_{batch}']:.3f}" for batch in (1, 32) for precision in ("fp32", "int8")),
                *(f"{row[f'times_faster_{batch}']:.2f}" for batch in (1, 32)),
            )
            for row in result["rows"]
        ]
        lines += [*markdown(INT8_SPEED_HEAD, table), "", f"{provenance(result)} {result['rows'][0]['runtime']}.", ""]
    return lines[:-1]


def steps_table(results: Sequence[Result]) -> list[str]:
    """A row a pair and batch: the engine's step against the bare ones, as shares of their throughput; `steps`."""
    lines: list[str] = []
    for result in results:
        looking = GPU_DEFAULTS["looking_share"] if result["machine"]["gpu"] else DistillationSettings.looking_share
        table = [
            (
                row["pair"],
                str(row["batch"]),
                row["precision"],
                *(
                    f"{row[f'{step}_ms']:.2f}" if f"{step}_ms" in row else UNKNOWN
                    for step in ("engine", "engine_without_graphs", "bare", "bare_without_teacher")
                ),
                *(f"{100 / row[ratio]:.0f} %" if ratio in row else UNKNOWN for ratio in (*STEP_RATIOS, WHOLE_RUN)),
            )
            for row in (with_whole_run(each, looking) for each in result["rows"])
        ]
        lines += [*markdown(STEPS_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def with_whole_run(row: Result, looking: float) -> Result:
    """The row and, where it has maps, a step's time over a whole run, a share `looking` of which has them."""
    if "ratio_with_maps_to_bare" not in row:
        return row
    ratio = looking * row["ratio_with_maps_to_bare"] + (1 - looking) * row["ratio_to_bare_with_those"]
    return {**row, WHOLE_RUN: ratio}


def growth_table(results: Sequence[Result]) -> list[str]:
    """A row a case of what varies; the kind `growth`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                GROWTH_NAMES[row["axis"]],
                f"{row['teacher']} ({row['teacher_parameters']:,})"
                if row["axis"] == "teacher"
                else f"{row[row['axis']]:,}",
                str(row["batch"]),
                f"{row['seconds_per_round']:.2f}",
                f"{row['seconds_per_1000_images']:.2f}",
                f"{row['peak_memory_mb']:,.0f}",
            )
            for row in result["rows"]
        ]
        lines += [*markdown(GROWTH_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def latency_table(results: Sequence[Result]) -> list[str]:
    """A row a network, batch and runtime, and why where there is none; the kind `gpu_latency`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["network"],
                str(row["batch"]),
                row["runtime"],
                *(f"{row['latency_ms'][part]:.2f}" for part in ("p50", "p90", "p99")),
            )
            for row in result["rows"]
            if "latency_ms" in row
        ]
        reasons = {row["runtime"]: row["not_run"] for row in result["rows"] if "not_run" in row}
        missing = [f"- Not run by us, {runtime}: {reason}." for runtime, reason in reasons.items()]
        lines += [*markdown(LATENCY_HEAD, table), "", *missing, provenance(result), ""]
    return lines[:-1]
