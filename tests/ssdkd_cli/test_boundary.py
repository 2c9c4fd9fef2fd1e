import pytest

from ssdkd_cli.boundary import exit_code_of


def test_out_of_memory_advises_nothing_that_a_command_may_lack(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MemoryError

    assert exit_code_of(fail) == 1  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "--" not in said
