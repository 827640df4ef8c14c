"""Commands in processes of their own that cost no import: they are forked from one that has imported already.

Python's fork server: a process with a single thread, which imports what is named here and forks for each command.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

PRELOADED = [
    "pytest", "tests.forking", "srnn.__main__", "srnn.commands.train", "srnn.commands.compare",
    "srnn.training.run", "srnn.training.follower", "torch._dynamo",
    "srnn.inference.unpacking", "sklearn.datasets",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


def _command(arguments, folder, environment, output):
    """In the forked process: run a command as ``python -m srnn`` would, or train as a config says."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 70
    try:
        # This file says that the command is there: from now on an interrupt is answered as one.
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.chdir(folder)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        code = _run(arguments)
    except KeyboardInterrupt:  # outside of main's own lines
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(arguments):
    import torch

    from srnn.__main__ import main
    from srnn.config.settings import Settings
    from srnn.interrupts import interruptible
    from srnn.training.run import train
    from tests.conftest import less_to_time_and_draw

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        less_to_time_and_draw(patch)
        if isinstance(arguments, Settings):
            with interruptible():  # as main has it
                train(arguments, Path("run"), command=["srnn"])
            return 0
        sys.argv = ["srnn", *arguments]
        return main(arguments)


class Forked:
    """A command in a process of its own, which takes signals from now on.

    Args:
        arguments: of srnn; or a config, whose run is trained in ``run``: composing it would take most of the time.
        folder: where it runs; what it prints is in ``said`` there.
        environment: variables to set; None takes one away.
    """

    def __init__(self, arguments, folder, environment=None):
        self.output = folder / "said"
        if isinstance(arguments, list):
            arguments = [str(word) for word in arguments]
        self.process = SERVER.Process(
            target=_command, args=(arguments, str(folder), environment or {}, str(self.output))
        )
        self.output.unlink(missing_ok=True)
        self.process.start()
        while not self.output.exists() and self.process.is_alive():
            time.sleep(0.001)

    def end(self, seconds=120):
        """Wait for it; returns the exit code, negative for a signal, and what it said."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.said()}"
        return self.process.exitcode, self.said()

    def said(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def send(self, number):
        os.kill(self.process.pid, number)


def _follow(words, environment, said, errors):
    """In the forked process: train with the other ranks, as ``python -m srnn.training.follower`` would."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handle, stream in ((said, 1), (errors, 2)):
        os.dup2(handle.fileno(), stream)
        handle.close()
    code = 70
    try:
        import torch

        from srnn.training import follower

        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(1)
        sys.argv = ["follower", *words]
        code = follower.main()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedRank:
    """What ``subprocess.Popen`` makes of another rank of a run, for whoever starts it: with the same methods."""

    def __init__(self, command, stdin, stdout, stderr, start_new_session):
        assert command[:3] == [sys.executable, "-m", "srnn.training.follower"]
        self.stdout, said = multiprocessing.Pipe(duplex=False)
        errors = Connection(os.dup(stderr.fileno()), readable=False)
        self.process = SERVER.Process(target=_follow, args=(command[3:], dict(os.environ), said, errors))
        self.process.start()
        said.close()
        errors.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self):
        self.process.join()
        self.stdout.close()


def fork_ranks(monkeypatch):
    """Other ranks are forked from now on."""
    from srnn.training import processes

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "PIPE", "TimeoutExpired")}
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=ForkedRank, **names))
