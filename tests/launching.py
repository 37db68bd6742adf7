"""Two processes on this machine, as torchrun starts them."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from forks import fork_script


def free_port() -> int:
    """A port of this machine nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def two_alone(script: Path, *arguments: str, timeout: int) -> list[subprocess.CompletedProcess[str]]:
    """`script` in two gloo processes with nobody who ends one when the other fails; how each ended.

    Raises:
        TimeoutError: one of them still waits after `timeout` seconds; both are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(script, arguments, Path(folder))
        _wait(processes, timeout)
        return [
            subprocess.CompletedProcess(
                arguments,
                process.exitcode or 0,
                *((Path(folder) / f"{rank}{ending}").read_text() for ending in (".out", ".err")),
            )
            for rank, process in enumerate(processes)
        ]


def two_processes(script: Path, *arguments: str, timeout: int = 600) -> None:
    """Run `script` in two gloo processes of one thread each and wait for it: torchrun without its imports."""
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(script, arguments, Path(folder))
        _wait(processes, timeout, together=True)
        for rank, process in enumerate(processes):
            assert process.exitcode == 0, (Path(folder) / f"{rank}.err").read_text()[-3000:]


def one_process(script: Path, *arguments: str, timeout: int = 600) -> None:
    """Run `script` as torchrun starts a single process, and wait for it."""
    with tempfile.TemporaryDirectory() as folder:
        (process,) = processes = _start(script, arguments, Path(folder), number=1)
        _wait(processes, timeout)
        assert process.exitcode == 0, (Path(folder) / "0.err").read_text()[-3000:]


def torchrun(
    script: Path, *arguments: str, timeout: int = 600, environment: Mapping[str, str] | None = None
) -> None:
    """The same by torchrun itself, which takes some ten seconds longer."""
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *(str(script), *arguments),
    ]
    paths = [str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch,
        env=os.environ | own | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _start(script: Path, arguments: tuple[str, ...], folder: Path, number: int = 2) -> list[BaseProcess]:
    """Processes with the variables that torchrun sets; rank 0 says what it says in `folder`/0.out."""
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [
        fork_script(script, arguments, shared | {"RANK": rank, "LOCAL_RANK": rank}, folder / rank)
        for rank in map(str, range(number))
    ]


def _wait(processes: list[BaseProcess], timeout: int, *, together: bool = False) -> None:
    """Until both have ended, or where they end `together` one has failed: then the other is killed."""
    limit = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in processes):
            if together and any(process.exitcode for process in processes):
                return
            if time.monotonic() > limit:
                raise TimeoutError(f"a process still waits after {timeout} seconds")
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
