"""What other packages and an operator's own files add to ours, found by name.

A package offers a thing as an entry point of one of `GROUPS`, `name = "package.module:Class"`. A
file is lent to this process, or kept in a folder under the SHA-256 of its bytes, so that what was
named once is found for as long as it may be asked for. Nothing is imported before it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast, get_type_hints

from fedml import durable
from fedml.errors import ConfigError, Corrupt

T = TypeVar("T")
GROUPS: Mapping[str, str] = {  # of entry points, by what one of them is
    "strategy": "fedml.strategies",
    "rule": "fedml.rules",
    "statistic": "fedml.statistics",
    "reducer": "fedml.reducers",
    "recipe": "fedml.recipes",
    "executor": "fedml.executors",
    "registry": "fedml.registries",
}
_FAULTS = (
    ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """A thing of a package, or of a file: `target` is `module:Class` or `/path/file.py:Class`.

    `package` is a distribution with its version, "" for a file. `kept` is the digest under which
    a file was kept.
    """

    kind: str
    name: str
    target: str
    package: str = ""
    kept: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of {self.package or 'a file'} ({self.target})"

    @property
    def remedy(self) -> str:
        """Return what to do about an offer that is no good."""
        return f"mend or uninstall {self.package}" if self.package else "mend the file"

    @property
    def dotted(self) -> str:
        """Return the target as one dotted name, as a configuration's `_target_` has it."""
        return self.target.replace(":", ".")

    def place(self) -> Path:
        """Return the file of its source, without importing it; raises `ConfigError`."""
        home, colon, attribute = self.target.rpartition(":")
        if not (colon and home and attribute.isidentifier()):
            raise ConfigError(
                f"{self.kind} {self.name!r} is {self.target!r}; write /path/file.py:Class"
            )
        return Path(home) if home.endswith(".py") else self._module_file(home)

    def source(self) -> bytes:
        """Return the bytes of its source, whose SHA-256 is its digest; raises `ConfigError`."""
        place = self.place()
        try:
            found = place.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.kind} {self.name!r}: {place}: {error.strerror}") from error
        if self.kept and digest_of(found) != self.kept:
            raise Corrupt(f"{place}: its bytes are not those of its name; allow the file again")
        return found

    def load(self, source: bytes) -> object:
        """Return the thing itself, of the very `source` that was read; raises `ConfigError`."""
        home, _, attribute = self.target.rpartition(":")
        try:
            if home.endswith(".py"):
                module = _execute(self.kind, Path(home), source)
            else:
                module = importlib.import_module(home)
            return getattr(module, attribute)
        except _FAULTS as error:
            line = str(error).splitlines() or [type(error).__name__]
            raise ConfigError(f"{self} does not load: {line[0]}; {self.remedy}") from error

    def _module_file(self, module: str) -> Path:
        top, *rest = module.split(".")
        spec = importlib.util.find_spec(top)  # of the top alone: this imports nothing
        if spec is None:
            raise ConfigError(f"{self} does not load: there is no module {top}; {self.remedy}")
        if not rest:
            return Path(spec.origin or top)
        for folder in spec.submodule_search_locations or ():
            stem = Path(folder, *rest)
            for place in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
                if place.is_file():
                    return place
        raise ConfigError(f"{self} does not load: {module} has no source file; {self.remedy}")


def digest_of(source: bytes) -> str:
    """SHA-256 in hex, by which plans and policies name code."""
    return hashlib.sha256(source).hexdigest()


def _execute(kind: str, place: Path, source: bytes) -> ModuleType:
    """Run an operator's file, from the very bytes whose digest was compared."""
    name = f"fedml_{kind}_{digest_of(source)[:16]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(place)
        code = compile(source, str(place), "exec")
        sys.modules[name] = module  # dataclasses look their module up
        try:
            exec(code, module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


_lent: dict[tuple[str, str], Offer] = {}
_folders: dict[str, list[Path]] = {}


def keep(offer: Offer, folder: Path) -> str:
    """Keep a copy of an offered file in `folder`; return its digest, under which it stays."""
    source = offer.source()
    attribute, digest = offer.target.rpartition(":")[2], digest_of(source)
    folder.mkdir(exist_ok=True)
    durable.replace(folder / f"{offer.name}@{attribute}@{digest}.py", source)
    return digest


def lend_kept(kind: str, folder: Path) -> None:
    """Let all that is, or will be, kept in `folder` be found in this process."""
    folders = _folders.setdefault(kind, [])
    if folder not in folders:
        folders.append(folder)


def _kept(kind: str) -> Iterator[Offer]:
    for folder in _folders.get(kind, ()):
        for place in sorted(folder.glob("*@*@*.py")):
            name, attribute, digest = place.stem.split("@")
            yield Offer(kind, name, f"{place}:{attribute}", kept=digest)


@cache
def _packaged(kind: str, path: tuple[str, ...]) -> tuple[Offer, ...]:
    """Return what packages offer; what lies on `path`, the one things are imported from, stays."""
    found = set()
    for point in entry_points(group=GROUPS[kind]):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.module
        found.add(Offer(kind, point.name, point.value, package))
    return tuple(sorted(found, key=lambda offer: (offer.name, offer.target)))


def offers(kind: str) -> tuple[Offer, ...]:
    """Return all that is offered besides ours, by packages first."""
    lent = (offer for (what, _), offer in _lent.items() if what == kind)
    return (*_packaged(kind, tuple(sys.path)), *lent, *_kept(kind))


class Table(Mapping[str, T], Generic[T]):
    """Ours and what is offered of one kind, by name; looked up, a thing is loaded and checked.

    A name is never taken from ours, nor decided between two that offer it: whoever looks it up
    gets `ConfigError`, and all other names are as they were. `take` returns what the table holds
    of a thing that was loaded, or raises `ConfigError` with what it is not.
    """

    def __init__(
        self,
        kind: str,
        ours: Mapping[str, object],
        take: Callable[[object], T],
        others: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """Values of `ours` may be targets, loaded when used; `others` are names taken as well."""
        self.kind, self.ours, self._take, self._others = kind, dict(ours), take, others
        self._loaded: dict[Offer, tuple[T, str]] = {}

    def __getitem__(self, name: str) -> T:
        """Return a thing; raises `KeyError` if there is none, `ConfigError` if it is no good."""
        return self.find(name)[0]

    def find(self, name: str, digest: str = "") -> tuple[T, str]:
        """Return a thing and its source's digest, which is "" for ours.

        With `digest` it is that very one; raises `ConfigError` if there are others alone.
        """
        offered = [offer for offer in offers(self.kind) if offer.name == name]
        if name in self.ours or name in self._others():
            if offered:
                raise ConfigError(f"{offered[0]} has the name of one of ours; rename it there")
            return self._own(name), ""
        if not offered:
            raise KeyError(name)
        found = {self._digest(offer): offer for offer in offered}
        if digest and digest not in found:
            there = ", ".join(sorted(each[:12] for each in found))
            raise ConfigError(
                f"{self.kind} {name}: here is {there}, and {digest[:12]} is wanted; install or "
                "allow that very source"
            )
        if not digest and len(found) > 1:
            both = " and by ".join(str(offer.package or offer.target) for offer in offered)
            raise ConfigError(f"{self.kind} {name!r} is offered by {both}; keep one")
        return self.taken(found[digest] if digest else offered[0])

    def named(self, kind: type) -> tuple[str, str]:
        """Return the name of a class in the table, and its digest; raises `KeyError` if none."""
        for name, own in self.ours.items():
            if own in (kind, f"{kind.__module__}:{kind.__qualname__}"):
                return name, self.find(name)[1]
        for offer in offers(self.kind):
            if offer.target.rpartition(":")[2].rpartition(".")[2] == kind.__name__:
                found, digest = self.find(offer.name, self._digest(offer))
                if found is kind:
                    return offer.name, digest
        raise KeyError(kind.__name__)

    def lend(self, name: str, target: str) -> Offer:
        """Let a file's class be found by `name` in this process from now on.

        Raises `ConfigError`, and nothing has changed, if it is no good or the name is ours.
        """
        home, colon, attribute = target.rpartition(":")
        if not (colon and home.endswith(".py")):
            raise ConfigError(f"{self.kind} {target!r}: write file.py:Class")
        offer = Offer(self.kind, name, f"{Path(home).resolve()}:{attribute}")
        if name in self.ours or name in self._others():
            raise ConfigError(f"{offer} has the name of one of ours; give it another")
        self.taken(offer)
        _lent[self.kind, name] = offer
        return offer

    def origin(self, name: str) -> str:
        """Return where a thing is from, for a person."""
        here = [offer for offer in offers(self.kind) if offer.name == name]
        return "fedml" if name in self.ours else here[0].package or here[0].target

    def offered(self, dotted: str) -> T | None:
        """Return what is offered as the dotted name `dotted`, or None if nothing is."""
        names = [offer.name for offer in offers(self.kind) if offer.dotted == dotted]
        return self[names[0]] if names else None

    def __iter__(self) -> Iterator[str]:
        """Go over all names, ours first."""
        theirs = dict.fromkeys(offer.name for offer in offers(self.kind))
        return iter({**self.ours, **theirs})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.ours or any(offer.name == name for offer in offers(self.kind))

    def _own(self, name: str) -> T:
        thing = self.ours.get(name)
        if isinstance(thing, str):
            offer = Offer(self.kind, name, thing, "fedml")
            return self.taken(offer)[0]
        if thing is None:
            raise KeyError(name)
        return cast(T, thing)

    def _digest(self, offer: Offer) -> str:
        if offer in self._loaded:
            return self._loaded[offer][1]
        return offer.kept or digest_of(offer.source())

    def taken(self, offer: Offer) -> tuple[T, str]:
        """Return what is offered, loaded once and checked, with its digest."""
        if offer not in self._loaded:
            source = offer.source()
            thing = offer.load(source)
            try:
                if isinstance(thing, type):
                    get_type_hints(thing)  # settings are read by them
                self._loaded[offer] = self._take(thing), digest_of(source)
            except (ConfigError, NameError) as error:
                raise ConfigError(f"{offer} {error}; {offer.remedy}") from error
        return self._loaded[offer]
