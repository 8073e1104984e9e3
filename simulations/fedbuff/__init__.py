"""One site ten times slower than nine others: who waits for it, and what that costs."""
