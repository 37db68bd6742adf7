"""One of two processes that wait for a server's answers for longer than they wait for each other."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fiducial.reference import served
from fiducial.reference.cache import LogpStore
from fiducial.reference.identity import Identity
from tiny import random_groups


class SlowServer:
    """Needs half a second for each answer."""

    def logps(self, prompt, completion):
        time.sleep(0.5)
        return np.zeros(len(completion), np.float32)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    dist.barrier()
    distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
    served.AT_ONCE, served.SIGN_OF_LIFE_SECONDS = 1, 0.2
    store = LogpStore(Path(sys.argv[1], "records"), Identity("base", "0", "float32", "None"))
    asked = served.ask_for_missing(random_groups(6), SlowServer(), store, flush_every=1)
    Path(sys.argv[1], os.environ["RANK"]).write_text(f"{asked} {len(store)}", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
