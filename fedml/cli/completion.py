"""Tab completion of `fedml simulate`: Hydra's own, taught that our program has two words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_FLAGS = ("-sc", "--shell-completion", "--shell_completion")
_INSTALL = """\
_fedml_simulate_old=$(complete -p fedml 2> /dev/null | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
_fedml_simulate_complete()
{
    if [ "${COMP_WORDS[1]}" != simulate ] || [ "$COMP_CWORD" -lt 2 ]; then
        if [ -n "$_fedml_simulate_old" ]; then
            "$_fedml_simulate_old" "$@"
        else
            COMPREPLY=($(compgen -W "coordinator site run model privacy strategies \\
                simulate demo predict serve" -- \\
                "${COMP_WORDS[$COMP_CWORD]}"))
            [ ${#COMPREPLY[@]} -eq 1 ] && COMPREPLY[0]="${COMPREPLY[0]} "
        fi
        return
    fi
    local choices=$(COMP_LINE="$COMP_LINE" "${COMP_WORDS[0]}" simulate -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "${COMP_WORDS[$COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _fedml_simulate_complete fedml
"""
_UNINSTALL = "complete -r fedml 2> /dev/null; unset -f _fedml_simulate_complete"


def script(argv: Sequence[str]) -> str:
    """Return the script that `-sc install=bash` or `uninstall=bash` is to print, or ""."""
    asked = _asked(argv)
    return {"install=bash": _INSTALL, "uninstall=bash": _UNINSTALL}.get(asked, "")


@contextmanager
def one_word(argv: Sequence[str]) -> Iterator[None]:
    """Show Hydra `fedml simulate key=` as `simulate key=` while it answers `-sc query=...`.

    Hydra strips one word, the program, from the line it completes.
    """
    line = os.environ.get("COMP_LINE", "")
    program, _, rest = line.lstrip().partition(" ")
    if not (_asked(argv).startswith("query=") and program and rest.startswith("simulate")):
        yield
        return
    os.environ["COMP_LINE"] = rest
    try:
        yield
    finally:
        os.environ["COMP_LINE"] = line


def _asked(argv: Sequence[str]) -> str:
    """Return what follows a completion flag: "install=bash", "query=zsh", or ""."""
    for number, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if word in _FLAGS:
            return "".join(argv[number + 1 : number + 2])
        if flag in _FLAGS:
            return value
    return ""
