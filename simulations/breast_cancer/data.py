"""The rows come with scikit-learn, so there is nothing to download."""

from __future__ import annotations

from fedml.simulation.population import ShippedData

SOURCE = ShippedData("breast_cancer")
