"""The roof: the `fedml` command, which builds objects from settings and starts programs."""
