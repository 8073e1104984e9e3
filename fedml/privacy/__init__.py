"""Differential privacy: noise, mechanisms, accounting, and the ledger that a site keeps.

Import from the modules: `accounting` and `ledger` load no torch, the others do.
"""
