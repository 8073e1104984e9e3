"""Shakespeare, character by character: a site for each speaker."""
