"""`python -m fedml.simulate` is `fedml simulate`."""

import sys


def main() -> None:
    """Run one simulation or many, as the command line says."""
    from fedml.cli.main import main

    sys.argv[1:1] = ["simulate"]
    main()


if __name__ == "__main__":
    main()
