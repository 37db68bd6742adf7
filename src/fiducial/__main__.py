"""`python -m fiducial`, which launchers such as `torchrun -m` and `accelerate launch -m` call."""

from fiducial.cli import main

if __name__ == "__main__":
    main()
