"""What robust rules are worth: digits at eight honest sites and two that lie, in seven ways."""
