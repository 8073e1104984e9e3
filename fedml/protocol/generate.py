"""Regenerate the protobuf code: `python -m fedml.protocol.generate [--check]`.

With `--check` nothing is written, and the exit status is 1 if the committed code is stale.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "_generated"
NAMES = ("fedml_pb2.py", "fedml_pb2.pyi")


def generate() -> dict[str, bytes]:
    """Return each generated file's bytes; raises `CalledProcessError` if protoc refuses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", "fedml.proto"]
        subprocess.run(
            [*command, f"--python_out={folder}", f"--pyi_out={folder}"], check=True, cwd=HERE
        )
        return {name: (Path(folder) / name).read_bytes() for name in NAMES}


def main(arguments: list[str]) -> int:
    """Write what is stale, or with `--check` only name it; return the exit status."""
    stale = {
        name: data
        for name, data in generate().items()
        if not (OUT / name).exists() or (OUT / name).read_bytes() != data
    }
    if "--check" in arguments:
        for name in stale:
            print(f"{OUT / name} is stale; run python -m fedml.protocol.generate", file=sys.stderr)
        return 1 if stale else 0
    for name, data in stale.items():
        (OUT / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
