"""What a user may have meant: keys and names close to one that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_NO_KEY = re.compile(r"Could not override '([^']+)'")
_NO_OPTION = re.compile(r"Could not find '([^']+)'.*?Available options in '[^']+':(.*)", re.DOTALL)


def mend(text: str, folder: str, overrides: Sequence[str]) -> str:
    """Return Hydra's message `text` in one line that names the way out, if it is a misspelling.

    `folder` has the configurations that `overrides` are for.
    """
    if found := _NO_OPTION.search(text):
        group, _, option = found[1].rpartition("/")
        return f"{group}={option}: no such choice; {meant(option, found[2].split())}"
    if found := _NO_KEY.search(text):
        key = found[1]
        others = [o for o in overrides if o.lstrip("+~").partition("=")[0] != key]
        return f"{key}: no such setting; {meant(key, _keys(folder, others))}"
    return " ".join(text.split())


def meant(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?", or what there is beside it if nothing comes close."""
    names = sorted(set(known))
    home, _, last = word.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == home}
    close = [beside[name] for name in get_close_matches(last, beside, n=2, cutoff=0.65)]
    if not beside:
        close = get_close_matches(word, names, n=2)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join([*beside.values()] or names)}"


def _keys(folder: str, overrides: Sequence[str]) -> list[str]:
    """Return every dotted key of the simulation's configuration, and its groups."""
    loader = ConfigLoaderImpl(create_config_search_path(folder))
    try:
        config = loader.load_configuration("simulate", list(overrides), RunMode.RUN)
    except (HydraException, OmegaConfBaseException):
        config = loader.load_configuration("simulate", [], RunMode.RUN)
    groups = [name for name in loader.list_groups("") if name != "hydra"]
    return [*groups, *_below(config, "")]


def _below(node: DictConfig, prefix: str) -> list[str]:
    found: list[str] = []
    for key in map(str, node):
        if key in ("hydra", "_target_", "_partial_"):
            continue
        found.append(prefix + key)
        child = OmegaConf.select(node, key, throw_on_resolution_failure=False)
        if isinstance(child, DictConfig):
            found += _below(child, f"{prefix}{key}.")
    return found
