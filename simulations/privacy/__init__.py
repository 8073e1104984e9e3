"""What privacy costs in accuracy: two public datasets, five sites, epsilon 1, 3 and 8."""
