"""Programs that measure Fiducial against TRL and against the machine's own limit, on a CPU and on one GPU."""
