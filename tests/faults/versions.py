"""Other versions of fedml, made from this one: what a peer of an older or a newer one would say.

`edition` writes a folder; a program that has it on its Python path speaks that version: its
protobuf code is made of another fedml.proto, and it knows no field that is not in there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "fedml" / "protocol" / "fedml.proto"
OLDER = (  # what came last, and has a default
    "Welcome.now",
    "Forget.run",
    "Hello.runs",
    "Assignment.parcels",
    "Assignment.up",
    "Assignment.keep_model",
    "Trained.parcels",
)
USED = "used"  # a file that is there once a program has spoken this version
_EXTRA = 77  # the number of every field that a newer version has more

_SITECUSTOMIZE = """
import importlib.util, sys
if "fedml" in " ".join(sys.orig_argv):
    name = "fedml.protocol._generated.fedml_pb2"
    spec = importlib.util.spec_from_file_location(name, {generated!r})
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from fedml.protocol import codec, messages
    shapes, put, frame = codec._shapes, codec._put_message, codec._frame
    one, beats = codec._encode_one, [0]
    more = codec._varint(77 << 3 | 2) + codec._varint(5) + b"newer"

    def known(kind):
        there = codec._foreign(kind.__name__).DESCRIPTOR.fields_by_name
        return {{name: shape for name, shape in shapes(kind).items() if name in there}}

    def with_more(value, where):
        message = put(value, where)
        if "extra" in message.DESCRIPTOR.fields_by_name:
            message.extra = "newer"
        return message

    def framed(part, data):
        chunk = frame(b"", data) + more
        return part + codec._varint(len(chunk)) + chunk if part else chunk

    def moody(name, union, value):
        beats[0] += type(value) is messages.Beat
        if type(value) is messages.Beat and beats[0] % 2:
            return getattr(module, name)(mood=module.Mood(extra="newer")).SerializeToString()
        return one(name, union, value)

    codec._shapes, codec._put_message = known, with_more
    if hasattr(module, "Mood"):
        codec._frame, codec._encode_one = framed, moody
    open({used!r}, "a").close()
"""


def older(proto: str) -> str:
    """Return fedml.proto as it was before the newest fields came."""
    for field in OLDER:
        message, _, name = field.partition(".")
        proto, count = re.subn(
            rf"(message {message} {{[^}}]*?)\n[^\n]* {name} = \d+;", r"\1", proto
        )
        assert count == 1, field
    return proto


def newer(proto: str) -> str:
    """Return fedml.proto as it might be: each message has a field more, and there are new kinds."""
    proto = re.sub(r"^(message \w+ {)", rf"\1\n  string extra = {_EXTRA};", proto, flags=re.M)
    proto = proto.replace(f"  string extra = {_EXTRA};\n  oneof", "  oneof")
    for kind in ("Command", "SiteEvent"):
        proto = re.sub(rf"(message {kind} {{\n  oneof one {{)", r"\1\n    Mood mood = 78;", proto)
    return proto + f"\nmessage Mood {{\n  string extra = {_EXTRA};\n}}\n"


def edition(folder: Path, change: Callable[[str], str], *, major: int = 1) -> Path:
    """Make a version in `folder`, and return that; put it first on a program's Python path."""
    folder.mkdir()
    proto = change(PROTO.read_text())
    (folder / "fedml.proto").write_text(
        proto.replace("package fedml.v1;", f"package fedml.v{major};")
    )
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--python_out={folder}"]
    subprocess.run([*command, "fedml.proto"], check=True, cwd=folder)
    text = _SITECUSTOMIZE.format(generated=str(folder / "fedml_pb2.py"), used=str(folder / USED))
    (folder / "sitecustomize.py").write_text(text)
    return folder
