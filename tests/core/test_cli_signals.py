"""A command that is told to stop says one sentence, and its exit code is that of shells."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import typer

from drlora_core.cli import app, main
from drlora_core.cli.signals import raising_terminated


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [("SIGTERM", "stopped by SIGTERM"), ("SIGHUP", "stopped by SIGHUP"), ("SIGINT", "interrupted")],
)
def test_a_signal_ends_a_command_in_one_sentence(
    name: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number, cleaned = signal.Signals[name], []
    commands = typer.Typer()
    commands.callback()(lambda: None)

    @commands.command()
    def wait() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(app, "build", lambda: (commands, []))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main(["wait"])
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == f"drlora: {sentence}\n"
    assert cleaned == [True]
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(app, "run", lambda arguments: os.kill(os.getpid(), signal.SIGHUP))
    try:
        main([])  # under nohup
    except SystemExit as stopped:
        pytest.fail(f"it ended with {stopped.code}")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_listens_to_signals() -> None:
    """Python lets no other thread change what a signal does."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with raising_terminated():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_ctrl_c_while_commands_are_loaded_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "build", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["plan"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "drlora: interrupted\n"


@pytest.mark.usefixtures("default_signals")
def test_a_forked_worker_ends_as_it_would_without_us() -> None:
    with raising_terminated():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
    assert os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.usefixtures("default_signals")
def test_in_another_process_a_signal_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, in this process, where it is seen that nothing else is done."""
    sent = []
    with raising_terminated():
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(os, "getpid", lambda: 2**31 - 1)
        monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        assert callable(handler)
        handler(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sent == [(2**31 - 1, signal.SIGTERM)]
