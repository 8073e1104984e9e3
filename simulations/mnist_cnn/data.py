"""The sites are those of the 2NN: 100, IID or with two shards each."""

from simulations.mnist_2nn.data import Mnist

__all__ = ["Mnist"]
