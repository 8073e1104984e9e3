"""Messages and blobs between sites, operators and the coordinator, over gRPC with mutual TLS."""
