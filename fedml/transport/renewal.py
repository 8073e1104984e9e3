"""A caller's certificate, renewed in time: a site's, or a region's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from fedml.errors import FedmlError
from fedml.identity.certificates import Credentials, identity_in
from fedml.transport.rpc import GrpcLink, renew

_RENEWAL_LEAST, _RENEWAL_CHECK = 1.0, 3600.0  # seconds
_log = structlog.get_logger()


async def keep_certified(link: GrpcLink, folder: Path) -> None:
    """Renew the certificate once two thirds of its life are over, by the coordinator's clock.

    The connection that is open goes on with the old one, as long as that lives.
    """
    pause = _RENEWAL_LEAST
    while True:
        identity = identity_in(Credentials.load(folder).certificate)
        life = identity.expires - identity.issued
        wait = identity.issued + life * 2 / 3 - link.now()
        if wait <= 0:
            try:
                renewed = await renew(link, folder)
                link.use(Credentials.load(folder))
                pause = _RENEWAL_LEAST
                _log.info("certificate renewed", life=round(renewed.expires - renewed.issued))
            except FedmlError as error:
                _log.warning("certificate not renewed yet", reason=str(error))
                pause = min(2 * pause, life / 30)  # it may only have met the daemon's first dial
            wait = pause
        await asyncio.sleep(min(max(wait, _RENEWAL_LEAST), _RENEWAL_CHECK))
