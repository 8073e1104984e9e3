"""FedProx's MNIST: 1,000 devices with two digits each."""
