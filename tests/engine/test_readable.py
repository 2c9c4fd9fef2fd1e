import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import SSDKDError
from engine.readable import check_readable


def test_a_file_that_is_there_and_holds_something(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    check_readable(tmp_path / "model.pt")


def test_missing_and_empty_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match=r"there is no file .*nowhere\.pt"):
        check_readable(tmp_path / "nowhere.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(SSDKDError, match=r"^empty\.pt is empty: expected .*, found 0 bytes"):
        check_readable(tmp_path / "empty.pt")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SSDKDError, match="is a folder") as caught:
        check_readable(tmp_path)
    assert "empty.pt" in caught.value.hint  # one of its files, the first


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "model.pt").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SSDKDError, match=r"model\.pt cannot be read: Permission denied") as caught:
        check_readable(tmp_path / "model.pt")
    assert "permissions" in caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SSDKDError, match="pipe is a pipe or a device"):
        check_readable(tmp_path / "pipe")


@pytest.mark.parametrize("command", ["compress --student resnet8", "inspect", "export"])
def test_a_file_that_is_not_there_is_said_before_pytorch_is_imported(command: str, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from ssdkd_cli.main import main\n"
        f"code = main({[*command.split(), 'gone.pt']!r})\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.startswith("ERROR there is no file gone.pt")
