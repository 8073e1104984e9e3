"""Anomaly detection: an autoencoder that has seen benign samples alone."""
