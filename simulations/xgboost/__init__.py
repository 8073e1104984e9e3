"""Boosted trees over adult's people, however they are dealt out."""
