"""Census income, by workclass."""
