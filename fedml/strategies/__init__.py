"""Federated algorithms: one file each, server half and site half side by side."""

from fedml.strategies.base import (
    Aggregate,
    LocalRule,
    Plain,
    Reducer,
    Reduction,
    ServerState,
    Statistic,
    Strategy,
    add_stack,
)
from fedml.strategies.catalogue import (
    REDUCERS,
    RULES,
    STATISTICS,
    build,
    describe,
    measures,
    reports,
    strategies,
)
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.newton import Newton
from fedml.strategies.reducers import WeightedMean

__all__ = [
    "REDUCERS",
    "RULES",
    "STATISTICS",
    "Aggregate",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "LocalRule",
    "Newton",
    "Plain",
    "Prox",
    "Reducer",
    "Reduction",
    "ServerState",
    "Statistic",
    "Strategy",
    "WeightedMean",
    "add_stack",
    "build",
    "describe",
    "measures",
    "reports",
    "strategies",
]
