"""Secure aggregation SA1: the coordinator learns the sum of the sites' vectors, and no vector."""

from fedml.protocol.secagg import Part
from fedml.secagg.coordinator import Coordinator
from fedml.secagg.masking import Grid, Total
from fedml.secagg.site import Site
from fedml.secagg.terms import Demands, Member, Roster, Terms, least_threshold

__all__ = [
    "Coordinator",
    "Demands",
    "Grid",
    "Member",
    "Part",
    "Roster",
    "Site",
    "Terms",
    "Total",
    "least_threshold",
]
