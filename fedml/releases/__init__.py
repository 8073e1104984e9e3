"""Finished models as signed, verifiable releases: built, registered, published, kept at a site."""
