"""German credit: one bank's loans, by what they are for."""
