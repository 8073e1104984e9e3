"""McMahan et al.'s convolutional network on MNIST."""
