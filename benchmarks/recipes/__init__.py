"""Recipes of the benchmarks, registered as an operator registers a file of his own."""
