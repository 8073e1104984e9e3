"""`fedml demo`: the whole product on one machine, every part of it real."""

from fedml.cli.demo.play import play

__all__ = ["play"]
