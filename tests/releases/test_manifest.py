from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.errors import ConfigError, Untrusted
from fedml.protocol.messages import Blob
from fedml.releases.manifest import Channel, Environment, Manifest, TensorSpec
from tests.bundles import facts, write_bundle


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    environment, _ = Environment.observe("1.0")
    manifest = replace(write_bundle(tmp_path), environment=environment)
    assert Manifest.decode(manifest.encode()) == manifest


def test_equal_manifests_have_equal_bytes_whatever_the_order_of_their_parts() -> None:
    one = replace(facts(), scores={"a": 1.0, "b": 2.0})
    two = replace(facts(), scores={"b": 2.0, "a": 1.0})
    assert one.encode() == two.encode()
    assert one.digest == two.digest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw.pop("lineage"),
        lambda raw: raw.update(format=2),
        lambda raw: raw.update(surprise=1),
        lambda raw: raw.update(version=0),
        lambda raw: raw.update(files={"../../etc/passwd": {"digest": "a" * 64, "size": 1}}),
        lambda raw: raw.update(files={"model.onnx": {"digest": "nonsense", "size": 1}}),
        lambda raw: raw.update(inputs=[{"name": "x", "datatype": "OBJECT", "shape": [1]}]),
        lambda raw: raw["lineage"].update(recipe="none"),
        lambda raw: raw["lineage"].update(epsilon={"a": -1.0}),
    ],
)
def test_a_malformed_manifest_is_untrusted(spoil: object) -> None:
    raw = json.loads(facts().encode())
    spoil(raw)  # type: ignore[operator]
    with pytest.raises(Untrusted, match="malformed manifest"):
        Manifest.decode(json.dumps(raw).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"nul", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_manifest_or_channel_are_untrusted(data: bytes) -> None:
    with pytest.raises(Untrusted):
        Manifest.decode(data)
    with pytest.raises(Untrusted):
        Channel.decode(data)


def test_a_manifest_checks_itself_at_birth() -> None:
    with pytest.raises(ConfigError):
        replace(facts(), files={"a/b": Blob("a" * 64, 1)})
    with pytest.raises(ConfigError):
        replace(facts(), version=0)
    with pytest.raises(ConfigError):
        TensorSpec("x", "FP32", (-2,))
