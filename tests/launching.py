"""Two processes on this machine, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def free_port() -> int:
    """A port of this machine nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def two_alone(script: Path, *arguments: str, timeout: int) -> list[subprocess.CompletedProcess[str]]:
    """`script` in two gloo processes with nobody who ends one when the other fails; how each ended.

    Raises:
        subprocess.TimeoutExpired: one of them still waits after `timeout` seconds; both are killed.
    """
    shared = _environment(script) | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *streams)
        for process, streams in zip(processes, said, strict=True)
    ]


def torchrun(
    script: Path, *arguments: str, timeout: int = 600, environment: Mapping[str, str] | None = None
) -> None:
    """Run `script` in two gloo processes of one thread each, and wait for it."""
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *(str(script), *arguments),
    ]
    done = subprocess.run(
        launch,
        env=_environment(script) | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _environment(script: Path) -> dict[str, str]:
    """One thread, and the imports of this process beside those of the script's folder."""
    paths = [str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
