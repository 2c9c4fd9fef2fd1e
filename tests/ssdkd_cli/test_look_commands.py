from pathlib import Path
from typing import Any


def test_inspect_says_what_is_in_the_file(ssdkd: Any, shared: Path) -> None:
    ran = ssdkd("inspect", shared / "teacher.pt", "--input", "1x16x16", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["spec"]["arch"], ran.json["spec"]["classes"]) == ("resnet8", 4)
    assert ran.json["student"] is None  # the teacher is the smallest itself
    assert ran.json["command"].startswith(f"ssdkd export {shared}/teacher.pt --precision int8 ")
    shown = ssdkd("inspect", shared / "teacher.pt", "--input", "1x16x16")
    assert ran.json["command"] in shown.out
    assert "No student of `ssdkd students` has fewer parameters" in shown.out
    named = ssdkd("inspect", shared / "teacher.pt", "--input", "1x16x16", "--classes", shared / "labels.txt", "--json")
    assert named.json["command"] == f"{ran.json['command']} --classes {shared / 'labels.txt'}"
    assert "resnet8" in shown.out


def test_students_lists_their_sizes(ssdkd: Any) -> None:
    rows = {row["name"]: row for row in ssdkd("students", "--json").json}
    assert rows["resnet20"]["parameters_32px"] == 269_722
    assert {"mobilenetv2", "shufflenetv2", "wrn16_1", "vgg8"} <= set(rows)
    shown = ssdkd("students").out
    assert all(name in shown for name in rows)


def test_doctor_says_what_is_here(ssdkd: Any) -> None:
    facts = ssdkd("doctor", "--json").json
    assert facts["onnxruntime"]
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    assert {"torch", "cuda", "gpu", "cpu", "cpu_precision", "tensorrt", "tensorrt_rtx"} <= set(facts)
    assert facts["findings"]
    assert "PyTorch" in ssdkd("doctor").out or "torch" in ssdkd("doctor").out
