import ctypes
import errno
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import typer

from ssdkd_cli.boundary import exit_code_of, within_boundary
from ssdkd_cli.outcome import Outcome
from ssdkd_cli.process import printing, uninterrupted


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]
)
def test_out_of_memory_advises_nothing_that_a_command_may_lack(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert exit_code_of(fail) == 1  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "--" not in said


@pytest.fixture
def as_started_from_a_terminal() -> Iterator[None]:
    """Signals as a shell's foreground gives them: what runs the tests, `nohup` or a job behind `&`, may ignore them."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_started_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_the_process_is_an_interruption(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before, saved = signal.getsignal(number), []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            saved.append(type(error))
            raise

    assert exit_code_of(work) == 130  # type: ignore[arg-type]
    assert saved == [KeyboardInterrupt]
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("as_started_from_a_terminal")
def test_signals_wait_for_the_end_of_what_must_not_be_cut(capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            done.append("all of it")
        done.append("more")

    assert exit_code_of(work) == 130  # type: ignore[arg-type]
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_the_result_is_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """A library in C writes to the file descriptor, and past it into buffers of its own."""

    def work() -> Outcome:
        print("by Python")
        print("by Python to the first stdout", file=sys.__stdout__)
        os.write(1, b"by a file descriptor\n")
        ctypes.CDLL(None).printf(b"by C\n")
        return Outcome(lambda: print("{}"))

    assert exit_code_of(work) == 0
    said = capfd.readouterr()
    assert said.out == "{}\n"
    assert all(f"by {who}\n" in said.err for who in ("Python", "a file descriptor", "C"))
    assert "first stdout" in said.err


def test_what_is_ignored_stays_ignored() -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code_of(lambda: os.kill(os.getpid(), signal.SIGHUP) or Outcome(lambda: None)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_the_system_says_of_a_file_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: OSError) -> Outcome:
        raise error

    assert exit_code_of(lambda: fail(OSError(errno.EFBIG, "File too large"))) == 1
    assert "ulimit -f" in capsys.readouterr().err
    assert exit_code_of(lambda: fail(FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"))) == 1
    assert "No such file or directory: gone" in capsys.readouterr().err
    said = "libcudart.so.13: cannot open shared object file: No such file or directory"
    assert exit_code_of(lambda: fail(OSError(said))) == 1
    assert f"a library is missing: {said}" in capsys.readouterr().err
    with pytest.raises(OSError, match="a bug"):
        exit_code_of(lambda: fail(OSError("a bug")))
    with pytest.raises(OSError, match="a bug"), printing():  # it is no failure to print
        fail(OSError("a bug"))


def test_out_is_advised_to_commands_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Outcome:
        raise OSError(errno.EROFS, "Read-only file system", "run/report.md")

    def fail_with_out(out: str) -> Outcome:
        return fail()

    with pytest.raises(typer.Exit):
        within_boundary(fail_with_out)(out="run")
    assert "choose a folder that you may write with --out DIR" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        within_boundary(fail)()
    said = capsys.readouterr().err
    assert "choose a folder that you may write" in said
    assert "--out" not in said


def test_libraries_that_memory_is_too_small_for(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    assert exit_code_of(fail) == 1  # type: ignore[arg-type]
    assert "out of memory" in capsys.readouterr().err
