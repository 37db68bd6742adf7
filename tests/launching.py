"""Two processes on this machine, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def torchrun(script: Path, *arguments: str, timeout: int = 600) -> None:
    """Run `script` in two gloo processes of one thread each, and wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        *(str(script), *arguments),
    ]
    found = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
