"""Whole federations in one program, on virtual time."""
