"""German credit: a bank's offices, one for each purpose of a loan."""
