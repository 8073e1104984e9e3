"""Experiments whose published or measured figures one command reproduces: `python -m simulations`.

A folder each: `recipe.py`, `data.py`, and a README with the table that a run must reproduce. The
configuration of the same name lies in `configs/experiment`.
"""
