"""A release at work: predictions over the Open Inference Protocol v2, REST and gRPC."""
