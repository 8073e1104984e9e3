"""The next character, by speaker."""
