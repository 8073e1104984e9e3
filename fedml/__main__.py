"""`python -m fedml` is the `fedml` command."""

from fedml.cli.main import main

main()
