"""`python -m fedml.simulate` is `fedml simulate`."""

import sys

from fedml.cli.console import guarded


def main() -> None:
    """Run one simulation or many, as the command line says."""
    from fedml.cli.simulate import simulate

    guarded(lambda: simulate(sys.argv[1:]))


if __name__ == "__main__":
    main()
