"""Where Hydra looks for plug-ins; ours is written in `fedml.cli.optuna`."""

from fedml.cli.optuna import OptunaSweeper

OptunaSweeper.__module__ = __name__  # Hydra builds plug-ins of this namespace only
__all__ = ["OptunaSweeper"]
