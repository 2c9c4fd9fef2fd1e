from pathlib import Path
from typing import Any

import pytest
import typer

from engine.errors import SSDKDError
from ssdkd_cli import compress as commands
from ssdkd_cli.config_file import read_config, write_config
from ssdkd_cli.labels import read_classes
from ssdkd_cli.main import app
from ssdkd_cli.options import Options, as_typed
from ssdkd_cli.parsing import parse_classes, parse_duration, parse_numbers, parse_shape


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1H1m1s", 3661)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "1.5h", "m", "0s", "10 minutes", "30m1h", "-5m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="90s, 10m or 1h30m"):
        parse_duration(text)


def test_shapes() -> None:
    assert parse_shape("3x32x48") == (3, 32, 48)
    assert parse_shape(" 1X28X28 ") == (1, 28, 28)
    for text in ("32", "3x32", "3x0x32", "3x32x32x1", "axbxc", "-3x32x32"):
        with pytest.raises(typer.BadParameter, match="3x32x32"):
            parse_shape(text)


def test_numbers_a_channel() -> None:
    assert parse_numbers("0.5") == (0.5,)
    assert parse_numbers("0.1, 0.2,0.3") == (0.1, 0.2, 0.3)
    for text in ("", "a", "0.1,,0.2", "nan", "inf,1", "1e99"):
        with pytest.raises(typer.BadParameter, match="one number a channel"):
            parse_numbers(text)


def test_classes_are_a_number_or_a_file(tmp_path: Path) -> None:
    assert parse_classes("10") == 10
    assert parse_classes("labels.txt") == Path("labels.txt")
    assert read_classes(10) == (10, None)
    assert read_classes(None) == (None, None)
    labels = tmp_path / "labels.txt"
    labels.write_text("apple\r\n\nT-shirt/top \n", encoding="utf-8")
    assert read_classes(labels) == (2, ("apple", "T-shirt/top"))
    labels.write_text("apple\nbee\n", encoding="utf-8-sig")  # as Windows writes it
    assert read_classes(labels) == (2, ("apple", "bee"))
    for content in (b"one", b"a\na\n", b"\xff\xfe\x00"):
        labels.write_bytes(content)
        with pytest.raises(SSDKDError, match="--classes"):
            read_classes(labels)


def options_of(name: str) -> dict[str, Any]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return {parameter.name: parameter for parameter in command.params}


def test_demo_takes_every_option_of_compress() -> None:
    demo, compress = options_of("demo"), options_of("compress")
    assert set(compress) - set(demo) == {"teacher"}
    assert set(demo) <= set(compress)
    for name, option in demo.items():
        assert option.opts == compress[name].opts
        assert option.help == compress[name].help


def test_demo_defaults_are_options() -> None:
    demo = options_of("demo")
    assert {name: demo[name].default for name in commands.DEMO_DEFAULTS} == commands.DEMO_DEFAULTS
    assert not any(option.required for option in demo.values())


def test_a_seed_that_pytorch_cannot_take_is_wrong_usage(ssdkd: Any) -> None:
    ran = ssdkd("demo", "--seed", 2**63)
    assert ran.code == 2
    assert "expected a number below 2^63" in ran.err


def test_the_options_are_those_of_the_contract() -> None:
    flags = {flag for option in options_of("compress").values() for flag in option.opts if flag.startswith("--")}
    assert flags == {
        *("--arch", "--input", "--mean", "--std", "--classes", "--trust-pickle", "--student", "--student-weights"),
        *("--effort", "--samples", "--time-limit", "--device", "--seed", "--config", "--batch-size"),
        *("--export", "--out", "--overwrite", "--json", "--eval-data", "--embed-preprocessing"),
        *("--precision", "--profile", "--qat", "--no-fallback", "--fp16-io"),
        *("--max-drop", "--max-latency-ms", "--max-size-mb", "--min-agreement"),
    }


def test_config_toml_is_read_as_it_was_written(tmp_path: Path) -> None:
    options = Options(
        teacher=tmp_path / 'a "quoted" name.pt',
        student="models.small:build",
        input=(3, 32, 32),
        mean=(0.5, 0.25, 0.125),
        classes=10,
        effort="smoke",
        time_limit=5400.0,
        export=["onnx"],
        out=Path("elsewhere"),
        json=True,
    )
    path = tmp_path / "config.toml"
    path.write_text(
        write_config(as_typed(options), {"meta": False, "gamma": 2.0}, {"meta": False, "gamma": 2.0, "beta": 0.4})
    )
    found = read_config(path)
    assert found["distillation"] == {"meta": False, "gamma": 2.0}
    assert "# beta = 0.4" in path.read_text()
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# Repeat this run in the folder in which it was started, where your own code is: ssdkd ")
    assert write_config({"student": "resnet8"}, {}, {}).startswith("# Repeat this run: ssdkd compress --config ")
    assert found["compress"] == {
        "teacher": str(tmp_path / 'a "quoted" name.pt'),
        "student": "models.small:build",
        "input": "3x32x32",
        "mean": [0.5, 0.25, 0.125],
        "classes": 10,
        "effort": "smoke",
        "time-limit": "5400s",
        "device": "auto",
        "seed": 0,
        "export": ["onnx"],
        "qat": "auto",
        "no-fallback": False,
        "fp16-io": False,
        "embed-preprocessing": False,
    }


@pytest.mark.parametrize(
    ("profile", "written"), [("rtx", "rtx"), ("kiosk", "{here}/kiosk"), ("k.toml", "{here}/k.toml")]
)
def test_a_profile_that_is_a_file_is_found_from_anywhere(
    profile: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kiosk", "k.toml"):
        (tmp_path / name).touch()
    found = as_typed(Options(teacher=Path("t.pt"), student="resnet8", profile=profile))
    assert found["profile"] == written.format(here=tmp_path)


def test_brackets_in_a_config_are_not_needed_and_do_no_harm(
    ssdkd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssdkd_cli import pipeline

    seen: list[Options] = []

    def stop(options: Options, **_: object) -> None:
        seen.append(options)
        raise SSDKDError("seen", "")

    monkeypatch.setattr(pipeline, "compress", stop)
    monkeypatch.chdir(tmp_path)
    Path("t.pt").write_bytes(b"a teacher")
    config = tmp_path / "ssdkd.toml"
    config.write_text("[compress]\nstudent='vgg8'\nprecision='int8'\nexport='onnx'\n")
    assert ssdkd("compress", "t.pt", "--config", config).code == 1
    assert (seen[0].precision, seen[0].export) == (["int8"], ["onnx"])
    config.write_text(
        "[compress]\nstudent=['vgg8']\neffort=['quick']\nmean=['0.5','0.25']\nprecision=['fp32','int8']\n"
    )
    assert ssdkd("compress", "t.pt", "--config", config).code == 1
    assert (seen[1].student, seen[1].effort, seen[1].mean) == ("vgg8", "quick", (0.5, 0.25))
    assert seen[1].precision == ["fp32", "int8"]


def test_an_option_is_in_a_config_once(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[compress]\nstudent='resnet8'\ntime-limit='2m'\ntime_limit='3m'\n", "utf-8-sig")
    ran = ssdkd("compress", shared / "teacher.pt", "--config", tmp_path / "c.toml")
    assert ran.code == 1
    assert "expected each option once, found time-limit and time_limit" in ran.err


def test_a_config_gives_no_leave_to_run_code(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[compress]\nstudent='resnet8'\ntrust-pickle=true\n")
    ran = ssdkd("compress", shared / "teacher.pt", "--config", tmp_path / "c.toml")
    assert ran.code == 1
    assert "has trust-pickle: a file cannot give leave" in ran.err
    assert "type --trust-pickle" in ran.err


def test_what_is_typed_wins_over_the_config(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from ssdkd_cli import pipeline

    seen: list[Options] = []

    def stop(options: Options, **_: Any) -> None:
        seen.append(options)
        raise SSDKDError("seen", "")

    monkeypatch.setattr(pipeline, "compress", stop)
    monkeypatch.chdir(tmp_path)
    Path("t.pt").write_bytes(b"a teacher")
    config = tmp_path / "ssdkd.toml"
    config.write_text(
        "[compress]\nstudent='vgg8'\nseed=7\neval_data='images'\nmean=[0.1,0.2,0.3]\ntime-limit='2m'\n"
        "export=['onnx','onnx']\nno-fallback=true\nclasses=5\n"
    )
    ssdkd("compress", "t.pt", "--config", config, "--seed", "8")
    ssdkd("compress", "t.pt", "--student", "resnet8")
    ssdkd("demo", "--config", config, "--student", "resnet20")
    first, second, third = seen
    assert (first.teacher, first.student, first.seed) == (Path("t.pt"), "vgg8", 8)
    assert (first.mean, first.time_limit, first.classes) == ((0.1, 0.2, 0.3), 120.0, 5)
    assert (first.eval_data, first.export, first.no_fallback) == (Path("images"), ["onnx"], True)
    assert (second.seed, second.mean, second.export, second.effort) == (0, None, [], "full")
    assert (third.student, third.seed, third.teacher) == ("resnet20", 7, commands.DEMO_TEACHER)
    assert third.out == Path("runs/demo")
