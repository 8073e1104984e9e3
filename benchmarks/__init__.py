"""fedml beside its peers and beside the physical limit."""
