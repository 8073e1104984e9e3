"""Reducers that a minority of lying sites cannot lead astray; each sees every update by itself."""

from fedml.strategies.robust.coordinatewise import MeanAroundMedian, Median, TrimmedMean
from fedml.strategies.robust.default import Robust
from fedml.strategies.robust.geometric import CentredClipping, GeometricMedian
from fedml.strategies.robust.nearest import Bulyan, Krum, MultiKrum
from fedml.strategies.robust.trusted import FLTrust

__all__ = [
    "Bulyan",
    "CentredClipping",
    "FLTrust",
    "GeometricMedian",
    "Krum",
    "MeanAroundMedian",
    "Median",
    "MultiKrum",
    "Robust",
    "TrimmedMean",
]
