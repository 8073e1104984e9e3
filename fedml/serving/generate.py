"""Write `_generated` from the .proto file: `python -m fedml.serving.generate [--check]`.

The messages go into a descriptor pool of their own. Triton's client and KServe bring the same
names, and the default pool refuses to hold them twice in one process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fedml.errors import ConfigError

_HERE = Path(__file__).parent
_PROTO = "open_inference_grpc.proto"
_STEM = "open_inference_grpc_pb2"
_POOL = "_descriptor_pool.Default()"


def generate(folder: Path) -> dict[str, bytes]:
    """Return the generated files by name; works in the empty `folder`.

    Raises `ConfigError` if grpcio-tools is missing, or made something we cannot adapt.
    """
    try:
        from grpc_tools import protoc  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("grpcio-tools is missing; pip install grpcio-tools==1.81.1") from error
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi")]
    if protoc.main(["protoc", f"-I{_HERE}", *outputs, str(_HERE / _PROTO)]):
        raise ConfigError(f"protoc refuses {_HERE / _PROTO}")
    messages = (folder / f"{_STEM}.py").read_text()
    if messages.count(_POOL) != 1:
        raise ConfigError("this grpcio-tools writes other code than 1.81.1; adapt generate.py")
    return {
        f"{_STEM}.py": messages.replace(_POOL, "_descriptor_pool.DescriptorPool()").encode(),
        f"{_STEM}.pyi": (folder / f"{_STEM}.pyi").read_bytes(),
        "__init__.py": b'"""Made by fedml.serving.generate; do not edit."""\n',
    }


def main(arguments: list[str]) -> int:
    """Write the files, or with `--check` say whether they are up to date; return exit status."""
    with tempfile.TemporaryDirectory() as folder:
        files = generate(Path(folder))
    target = _HERE / "_generated"
    if "--check" in arguments:
        stale = [n for n, data in files.items() if (target / n).read_bytes() != data]
        if stale:
            print(f"stale: {', '.join(stale)}; run python -m fedml.serving.generate")
        return int(bool(stale))
    target.mkdir(exist_ok=True)
    for name, data in files.items():
        (target / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
