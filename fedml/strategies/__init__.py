"""Federated algorithms: one file each, server half and site half side by side."""

from fedml.strategies.base import (
    NUMBER,
    Aggregate,
    Contrast,
    Follower,
    LocalRule,
    Personal,
    Plain,
    Reducer,
    Reduction,
    Sample,
    ServerState,
    Statistic,
    Strategy,
    SumReduction,
    Twofold,
    add_stack,
    number,
)
from fedml.strategies.buffering import Buffering, buffering_of
from fedml.strategies.catalogue import (
    REDUCERS,
    RULES,
    STATISTICS,
    STRATEGIES,
    build,
    check_model,
    contrasts,
    describe,
    first_model,
    in_turn,
    is_bounded,
    is_personal,
    is_twofold,
    keeps_deltas,
    layouts,
    measures,
    needs_exact_model,
    needs_means,
    not_at_once,
    numbers,
    objections,
    one_by_one,
    own,
    own_model,
    reports,
    rule_of,
    scores_exact,
    specimen,
    wide,
)
from fedml.strategies.central import NoisyMean
from fedml.strategies.cyclic import Cyclic
from fedml.strategies.ditto import Ditto
from fedml.strategies.fedasync import FedAsync
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedbn import FedBN
from fedml.strategies.fedbuff import FedBuff
from fedml.strategies.feddyn import FedDyn
from fedml.strategies.fedexp import FedExP
from fedml.strategies.fednova import FedNova
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedper import FedPer
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.fedrep import FedRep
from fedml.strategies.forest import Forest
from fedml.strategies.kmeans import KMeans
from fedml.strategies.lbfgs import LBFGS
from fedml.strategies.moon import Moon
from fedml.strategies.newton import Newton
from fedml.strategies.pca import PCA
from fedml.strategies.pfedme import PFedMe
from fedml.strategies.qfedavg import QFedAvg
from fedml.strategies.reducers import WeightedMean
from fedml.strategies.scaffold import Scaffold
from fedml.strategies.xgboost import XGBoost

__all__ = [
    "LBFGS",
    "NUMBER",
    "PCA",
    "REDUCERS",
    "RULES",
    "STATISTICS",
    "STRATEGIES",
    "Aggregate",
    "Buffering",
    "Contrast",
    "Cyclic",
    "Ditto",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedBuff",
    "FedDyn",
    "FedExP",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedYogi",
    "Follower",
    "Forest",
    "KMeans",
    "LocalRule",
    "Moon",
    "Newton",
    "NoisyMean",
    "PFedMe",
    "Personal",
    "Plain",
    "Prox",
    "QFedAvg",
    "Reducer",
    "Reduction",
    "Sample",
    "Scaffold",
    "ServerState",
    "Statistic",
    "Strategy",
    "SumReduction",
    "Twofold",
    "WeightedMean",
    "XGBoost",
    "add_stack",
    "buffering_of",
    "build",
    "check_model",
    "contrasts",
    "describe",
    "first_model",
    "in_turn",
    "is_bounded",
    "is_personal",
    "is_twofold",
    "keeps_deltas",
    "layouts",
    "measures",
    "needs_exact_model",
    "needs_means",
    "not_at_once",
    "number",
    "numbers",
    "objections",
    "one_by_one",
    "own",
    "own_model",
    "reports",
    "rule_of",
    "scores_exact",
    "specimen",
    "wide",
]
