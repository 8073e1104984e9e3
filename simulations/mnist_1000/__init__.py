"""FedProx's MNIST: a thousand sites with two digits each, their sizes by a power law."""
