"""Who the simulated sites are, and which rows each of them holds."""

from fedml.simulation.population.data import Data, DataFile, ShippedData
from fedml.simulation.population.features import FeatureShift
from fedml.simulation.population.natural import Column, Files
from fedml.simulation.population.quantity import DirichletSizes, LogNormal, PowerLaw
from fedml.simulation.population.skew import IID, Dirichlet, FewLabels, Population, Shards
from fedml.simulation.population.split import SiteRows, Split, describe

__all__ = [
    "IID",
    "Column",
    "Data",
    "DataFile",
    "Dirichlet",
    "DirichletSizes",
    "FeatureShift",
    "FewLabels",
    "Files",
    "LogNormal",
    "Population",
    "PowerLaw",
    "Shards",
    "ShippedData",
    "SiteRows",
    "Split",
    "describe",
]
