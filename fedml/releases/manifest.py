"""What a release is: its files by digest, what made it, and what it takes in and gives out.

A bundle is a folder of files and `manifest.json`, which names every other file by SHA-256. The
SHA-256 of that JSON is *the release digest*: channels, pointers and sites name releases by it.
No torch here: a site that only serves reads manifests too.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar, cast

from fedml.durable import dump_json
from fedml.errors import ConfigError, FedmlError, Untrusted
from fedml.protocol.messages import Blob, RecipeId, RunId, Scores, check_digest, check_name

MANIFEST, MODEL, WEIGHTS = "manifest.json", "model.onnx", "weights.safetensors"
GOLDEN, ENVIRONMENT = "golden.npz", "environment.txt"
_DATATYPES = frozenset(
    ["BOOL", "FP16", "FP32", "FP64"] + [f"{s}INT{b}" for s in ("", "U") for b in (8, 16, 32, 64)]
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model's signature: Open Inference datatype, and -1 for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.datatype not in _DATATYPES:
            raise ConfigError(f"tensor {self.name!r}: datatype {self.datatype!r} cannot be served")
        if not self.name or any(size < -1 for size in self.shape):
            raise ConfigError(f"tensor {self.name!r}: shape {self.shape}")


@dataclass(frozen=True)
class Environment:
    """The software a version was made with; `digest` is that of the list of packages."""

    digest: str
    python: str
    platform: str
    version: str  # of fedml

    @staticmethod
    def observe(version: str) -> tuple[Environment, str]:
        """Describe this process; the second value is the package list, `name==version` a line."""
        told = (one.metadata for one in distributions())  # parsed anew each time it is asked for
        found = {f"{one['Name'].lower()}=={one['Version']}" for one in told if one}
        text = "".join(f"{line}\n" for line in sorted(found))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Environment(digest, platform.python_version(), platform.platform(), version), text

    def __post_init__(self) -> None:
        check_digest("environment", self.digest)


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from, in digests: never data, always enough to ask the next question.

    `receipts` are the SHA-256 of the rounds' receipts, oldest first; `plan` that of the run's
    plan; `code` that of the training code. `data` and `epsilon` are by site: the keyed dataset
    digest each site declared, and what its ledger had spent, at `delta`, when the run ended.
    """

    run: RunId
    recipe: RecipeId
    rounds: int
    parent: int = 0  # the version that training started from, 0 for none
    receipts: tuple[str, ...] = ()
    plan: str = ""
    code: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    epsilon: Mapping[str, float] = field(default_factory=dict)
    delta: float = 0.0

    def __post_init__(self) -> None:
        for what, digest in (("plan", self.plan), ("code", self.code)):
            if digest:
                check_digest(what, digest)
        for receipt in self.receipts:
            check_digest("receipt", receipt)
        if self.rounds < 0 or self.parent < 0 or not 0 <= self.delta < 1:
            raise ConfigError(
                f"lineage of {self.run}: rounds {self.rounds}, parent {self.parent}, "
                f"delta {self.delta}"
            )
        if not all(0 <= spent < math.inf for spent in self.epsilon.values()):
            raise ConfigError(f"lineage of {self.run}: epsilon {dict(self.epsilon)}")


@dataclass(frozen=True)
class Manifest:
    """A release in full. `created` is in seconds since the epoch; `files` leaves out itself."""

    model: str
    version: int
    created: float
    lineage: Lineage
    labels: tuple[str, ...] = ()
    scores: Scores = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    environment: Environment | None = None
    files: Mapping[str, Blob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("model", self.model)
        for name in self.files:
            check_name("file", name)
        if self.version < 1 or not math.isfinite(self.created) or MANIFEST in self.files:
            raise ConfigError(
                f"release {self.model}/{self.version}, created {self.created}: versions start at "
                f"1, and {MANIFEST} does not list itself"
            )

    def encode(self) -> bytes:
        """Return canonical JSON: equal manifests have equal bytes, and so equal digests."""
        return dump_json({"format": 1, **asdict(self)})

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """Read a manifest's JSON; raises `Untrusted` with what is wrong with it."""
        return _decode("manifest", data, _manifest)

    @property
    def digest(self) -> str:
        """The release digest: SHA-256 of `encode()`, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()


@dataclass(frozen=True)
class Channel:
    """What the sites shall serve of a model. `rev` grows with every change, a rollback too."""

    model: str
    rev: int
    version: int
    digest: str

    def __post_init__(self) -> None:
        check_name("model", self.model)
        check_digest("release", self.digest)
        if self.rev < 1 or self.version < 1:
            raise ConfigError(f"channel {self.model}: rev {self.rev}, version {self.version}")

    def encode(self) -> bytes:
        """Return canonical JSON."""
        return dump_json(asdict(self))

    @staticmethod
    def decode(data: bytes) -> Channel:
        """Read a channel's JSON; raises `Untrusted` with what is wrong with it."""
        return _decode("channel", data, lambda raw: Channel(**raw))


def code_digest() -> str:
    """SHA-256 over the names and bytes of this package's own source files, in hex."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def fingerprint(path: Path) -> Blob:
    """Return a file's SHA-256 and size; raises `Untrusted` if it cannot be read."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Blob(digest, file.tell())
    except OSError as error:
        raise Untrusted(f"{path}: {error.strerror}; fetch the release again") from error


def open_bundle(folder: Path, digest: str = "") -> Manifest:
    """Check every file of a bundle against its manifest, and the manifest against `digest`.

    Raises `Untrusted` naming the first file that is missing or differs. An empty `digest` takes
    the manifest's own word, which is right for a bundle that was just built.
    """
    found = fingerprint(folder / MANIFEST)
    if digest and found.digest != digest:
        raise Untrusted(f"{folder / MANIFEST}: digest {found.digest[:12]}, expected {digest[:12]}")
    manifest = Manifest.decode((folder / MANIFEST).read_bytes())
    if manifest.digest != found.digest:
        raise Untrusted(f"{folder / MANIFEST} is not canonical JSON; it was not written by fedml")
    for name, blob in manifest.files.items():
        if fingerprint(folder / name) != blob:
            raise Untrusted(f"{folder / name} is not what the manifest names; fetch it again")
    return manifest


def is_whole(folder: Path, digest: str = "") -> bool:
    """True if `open_bundle` has nothing against the folder."""
    try:
        open_bundle(folder, digest)
    except Untrusted:
        return False
    return True


def _decode(what: str, data: bytes, build: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict):
            raise TypeError(f"{type(raw).__name__}, not an object")
        return build(cast("dict[str, Any]", raw))
    except (FedmlError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Untrusted(f"malformed {what}: {type(error).__name__}: {error}") from error


def _manifest(raw: dict[str, Any]) -> Manifest:
    if raw.pop("format") != 1:
        raise ValueError("unknown format; this fedml is older than the one that wrote it")
    lineage, environment = dict(raw["lineage"]), raw["environment"]
    lineage["recipe"] = RecipeId(**lineage["recipe"])
    lineage["receipts"] = tuple(lineage["receipts"])
    raw |= {
        "lineage": Lineage(**lineage),
        "labels": tuple(raw["labels"]),
        "environment": None if environment is None else Environment(**environment),
        "files": {str(name): Blob(**blob) for name, blob in raw["files"].items()},
    }
    for side in ("inputs", "outputs"):
        raw[side] = tuple(TensorSpec(**{**t, "shape": tuple(t["shape"])}) for t in raw[side])
    return Manifest(**raw)
