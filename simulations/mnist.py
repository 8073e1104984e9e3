"""The MNIST files, for the experiments that share them: images as bytes, labels 0 to 9.

Data: LeCun, Cortes and Burges 1998, CC BY-SA 3.0; four idx files, gzipped, 60,000 images to train
on and 10,000 to test with.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from simulations.download import Source, find

_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist"  # the original site's files, kept
_DIGESTS = {
    "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SOURCES = {
    name: Source(f"mnist/{name}-ubyte.gz", f"{_MIRROR}/{name}-ubyte.gz", (digest,))
    for name, digest in _DIGESTS.items()
}
LABELS = tuple("0123456789")


def training_rows() -> Rows:
    """Return the 60,000 rows to train on: images [n, 784] of bytes, labels [n]."""
    return _rows("train")


def test_rows() -> Rows:
    """Return the 10,000 official test rows."""
    return _rows("t10k")


def read(images: Path) -> Rows:
    """Return the rows of an idx file of images, with the labels' file beside it."""
    labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    return Rows(read_idx(images).flatten(1), read_idx(labels).long())


def read_idx(path: Path) -> Tensor:
    """Return the bytes of an idx file, gzipped or not, in its shape; `ConfigError` if broken."""
    try:
        packed = path.read_bytes()
        data = gzip.decompress(packed) if path.suffix == ".gz" else packed
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
    except (OSError, EOFError, struct.error) as error:
        raise ConfigError(f"{path}: {error}; is this an idx file of MNIST?") from error
    start = 4 + 4 * dimensions
    if (zeros, kind) != (0, 8) or len(data) != start + math.prod(shape):
        raise ConfigError(f"{path}: not an idx file of {list(shape)} bytes; fetch it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def example_images(rows: int) -> Tensor:
    """Return made-up images: bytes drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, 784), generator=generator, dtype=torch.uint8)


class Pixels(nn.Module):
    """Bytes of 0 to 255 to floats of 0 to 1, in the shape that a row is given."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels of a batch of rows."""
        return (x.float() / 255.0).reshape(len(x), *self._shape)


def _rows(part: str) -> Rows:
    images, labels = (find(SOURCES[f"{part}-{kind}"]) for kind in ("images-idx3", "labels-idx1"))
    return Rows(read_idx(images).flatten(1), read_idx(labels).long())
