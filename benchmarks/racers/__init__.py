"""Simulators that race: ours, the bare loop that is the limit, and the peers."""
