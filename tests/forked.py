"""Processes that need not import torch and diffusers anew: forked from one that has done so."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, reduction
from types import SimpleNamespace
from typing import Any

from torch.multiprocessing import start_processes

from dit_accel.batch import fleet
from dit_accel.parallel import launcher

_KNOWN = (
    "dit_accel.batch.worker",
    "dit_accel.cli.main",
    "dit_accel.generation.run",
    "dit_accel.kernels.aot_linear",
    "dit_accel.kernels.aot_ragged",
    "dit_accel.kernels.aot_tables",
    "dit_accel.kernels.int8_attention.gluon",
    "dit_accel.kernels.pooled_attention.triton",
    "dit_accel.kernels.rectified_attention.triton",
    "dit_accel.parallel.sharing",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.wan.pipeline_wan",
    "torch.distributed.tensor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.umt5.modeling_umt5",
)
_STARTERS = (fleet, launcher)  # what starts processes of its own
_method = "forkserver"  # a forked process forks those that it starts itself


def spawn(work: Callable[..., None], arguments: tuple, count: int) -> None:
    """work(rank, *arguments) in `count` processes; raises what one of them raised."""
    _serve()
    start_processes(work, arguments, count, start_method="forkserver")


def _serve() -> None:
    """Have the server run, whose kernels are compiled and not interpreted."""
    multiprocessing.set_forkserver_preload(list(_KNOWN))
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    forkserver.ensure_running()
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted


class Popen:
    """As much of subprocess.Popen as we ask for, of `python -m MODULE …` and of nothing else.

    What it starts has a process, a directory, an environment and open files of its own, and what
    it starts in turn is forked as well. Of the variables that Python reads when it begins only
    PYTHONIOENCODING has an effect.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        python, flag, *words = command
        assert (python, flag) == (sys.executable, "-m"), command
        self.args, self.stdout, self.stderr = command, None, None
        ours: list[int] = []  # open for the process alone
        files = []
        for number, given in enumerate((stdin, stdout, stderr)):
            if given is None:
                files.append(_File(number))
            elif given == subprocess.DEVNULL:
                ours.append(os.open(os.devnull, os.O_RDWR))
                files.append(_File(ours[-1]))
            elif given == subprocess.PIPE:
                there, here = os.pipe()
                setattr(self, ("", "stdout", "stderr")[number], os.fdopen(there, "rb"))
                ours.append(here)
                files.append(_File(here))
            else:
                files.append(_File(given.fileno()))
        if _method == "forkserver":
            _serve()
        facts = (words, files, dict(env or os.environ), os.getcwd(), start_new_session)
        self._process = multiprocessing.get_context(_method).Process(target=_become, args=facts)
        self._process.start()
        for number in ours:
            os.close(number)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self) -> tuple[bytes | None, bytes | None]:
        """All that it says, once it is over; of little, or the other pipe would fill up."""
        said = [file and file.read() for file in (self.stdout, self.stderr)]
        self.wait()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """subprocess.run(command, env=env, capture_output=True, text=True) of `python -m MODULE …`."""
    process = Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    out, err = ((said or b"").decode(errors="replace") for said in process.communicate())
    return subprocess.CompletedProcess(command, process.wait(), out, err)


def starters(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on worker processes and those of a launcher are forked."""
    known = {**vars(subprocess), "Popen": Popen}
    for module in _STARTERS:
        put(module, "subprocess", SimpleNamespace(**known))


class _File:
    """An open file that goes with the process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _here, (reduction.DupFd(self.number),)


def _here(file: Any) -> _File:
    return _File(file.detach())


def _become(
    words: list[str], files: list[_File], env: dict[str, str], folder: str, session: bool
) -> None:
    global _method
    _method = "fork"
    for number, file in enumerate(files):
        os.dup2(file.number, number)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    starters()
    sys.argv = [*words]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
