"""Federated learning that hospitals and banks can run: train, release, serve."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("fedml")
except PackageNotFoundError:
    pass
else:
    raise ImportError(
        "another package named 'fedml' (TensorOpera) is installed in this environment and would "
        "mix its files with ours; run 'pip uninstall fedml', or use a fresh virtual environment"
    )

__version__ = "0.1.0"
