"""Anomalies found by an autoencoder that has seen none."""
