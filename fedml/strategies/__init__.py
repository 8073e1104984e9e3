"""Federated algorithms: one file each, server half and site half side by side."""

from fedml.strategies.base import (
    Aggregate,
    LocalRule,
    Plain,
    Reducer,
    Reduction,
    ServerState,
    Strategy,
    add_stack,
)
from fedml.strategies.catalogue import RULES, build, describe, strategies
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.reducers import WeightedMean

__all__ = [
    "RULES",
    "Aggregate",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "LocalRule",
    "Plain",
    "Prox",
    "Reducer",
    "Reduction",
    "ServerState",
    "Strategy",
    "WeightedMean",
    "add_stack",
    "build",
    "describe",
    "strategies",
]
