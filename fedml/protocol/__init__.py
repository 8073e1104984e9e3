"""What crosses the wire between coordinator, sites and operators."""
