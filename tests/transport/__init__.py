"""The transport, and a small world for it to be tested in."""
