import ast
import json
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import ssdkd_cli
from ssdkd_cli.main import app

ROOT = Path(__file__).parents[2]
COMMANDS = ("compress", "demo", "inspect", "students", "eval", "bench", "export", "report", "doctor", "profiles")


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60, **options)


def test_help_is_quick_and_does_not_load_torch() -> None:
    code = "import sys; from ssdkd_cli.main import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    for heavy in ("torch", "onnx", "onnxruntime", "numpy", "pydantic", "PIL", "timm"):
        assert f"'{heavy}'" not in ran.stderr
    assert all(command in ran.stdout for command in COMMANDS)
    assert min(seconds) < 0.5  # of processor time: what else the machine does is not ours


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, ssdkd: Any) -> None:
    ran = ssdkd(command, "--help")
    assert ran.code == 0
    described = ran.out.partition("╭")[0].partition("Usage:")[2].partition("\n")[2]
    assert f"ssdkd {command}" in described
    assert ran.err == ""


def test_there_are_no_other_commands() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


def test_version(ssdkd: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ssdkd_cli.__version__ == project["version"]
    assert ssdkd("--version").out == f"ssdkd {project['version']}\n"


def test_a_closed_pipe_is_no_error_to_talk_about() -> None:
    code = (
        "import sys; from ssdkd_cli.boundary import exit_code_of; from ssdkd_cli.outcome import Outcome\n"
        "sys.exit(exit_code_of(lambda: Outcome(lambda: print('x' * 10_000_000))))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.read(10)
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_printed_names_no_option_of_another_command() -> None:
    code = "import sys; from ssdkd_cli.main import main; sys.exit(main(['profiles']))"
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert "the result cannot be printed: No space left on device" in ran.stderr
    assert "--out" not in ran.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["compress", "--help"]])
def test_a_disk_that_is_full_for_what_no_command_prints(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ssdkd_cli.main", *words]
        ran = subprocess.run(command, cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    assert "the result cannot be printed: No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_run_goes_on_where_nobody_reads_what_it_shows(tmp_path: Path) -> None:
    code = (
        "import sys; from ssdkd_cli import console, main\n"
        "def work(*_):\n"
        "    sys.stdin.read()\n"
        "    for _ in range(3): console.warn('x' * 100_000); print('a library', file=sys.stderr)\n"
        "    return []\n"
        "import ssdkd_cli.environment as environment\n"
        "environment.doctor_findings = work\n"
        "sys.exit(main.main(['doctor', '--json']))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as run:
        assert run.stderr is not None
        run.stderr.close()
        run.stderr = None
        out, _ = run.communicate(b"", timeout=60)
    assert run.returncode == 0
    assert json.loads(out)["findings"] == []


def imports_of(folder: str) -> dict[str, set[str]]:
    """For each file of a folder, the first names of what it imports, wherever in the file."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names.add((node.module or "").partition(".")[0])
        found[path.name] = names
    return found


def test_who_may_import_whom() -> None:
    for name, names in imports_of("engine").items():
        assert not names & {"ssdkd_cli", "exporters", "rich", "typer"}, name
    for name, names in imports_of("exporters").items():
        assert not names & {"ssdkd_cli", "rich", "typer"}, name
    for name, names in imports_of("profiles").items():
        assert not names & {"ssdkd_cli", "exporters", "rich", "typer"}, name
    for name, names in imports_of("ssdkd_cli").items():
        assert "rich" not in names or name == "console.py", name


def test_the_engine_can_take_no_labels_and_no_folder_of_images() -> None:
    for name, names in imports_of("engine").items():
        assert not names & {"PIL", "cv2", "imageio", "csv"}, f"{name} could read images"
    for path in (ROOT / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = {item.arg for item in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)}
                assert not arguments & {"labels", "label", "eval_data", "labelled", "data_dir", "dataset", "loader"}, (
                    f"{path.name}: {node.name}"
                )
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"ImageFolder", "DataLoader", "datasets", "read_image", "decode_image"}, (
                    path.name
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path.name}: the engine never prints"
