"""McMahan et al.'s two-layer network on MNIST."""
