"""A ClientApp's answer to one message, whatever becomes of it: an error is a reply too."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedml.flower import private


@dataclass(frozen=True)
class Failure:
    """A site, by its partition, that answered with an error; where that came from, if known."""

    site: int
    reason: str
    trace: str = ""


def answer(
    app: ClientApp, message: Message, context: Context, site: int
) -> tuple[Message, Failure | None]:
    """Return the reply, and what failed if it is an error; `context` is as it is after it."""
    failure = None
    try:
        reply = app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the ClientApp returned {type(reply).__name__}, not a Message")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an app may raise anything
        failure = Failure(site, _brief(error), traceback.format_exc())
        # in the words of Flower's own runtime
        reply = refusal(message, private.RAISED, f"{type(error)}:<'{error}'>")
    if failure is None and reply.has_error():  # a mod's, say
        failure = Failure(site, str(reply.error.reason))
    return reply, failure


def refusal(message: Message, code: int, reason: str) -> Message:
    """Return an error as the reply to `message`."""
    return Message(Error(code, reason), reply_to=message)


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
