"""Where the `fiducial` command begins; `torchrun -m fiducial` and `python -m fiducial` begin here, too."""

import sys


def main() -> None:
    """Run the `fiducial` command; Ctrl-C while it is imported ends it without a traceback, too."""
    try:
        from fiducial.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
