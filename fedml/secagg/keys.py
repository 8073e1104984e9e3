"""A site's keys for one round: what it tells, what two sites share, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedml.errors import Untrusted
from fedml.protocol.messages import SiteId
from fedml.secagg.shares import SHARE
from fedml.secagg.terms import bind

Random = Callable[[int], bytes]  # so many bytes that nobody can guess
_NONCE = 12


def agree(private: X25519PrivateKey, other: bytes, context: bytes, purpose: bytes) -> bytes:
    """Return the 32 bytes that the holders of two keys share, in this context, for `purpose`."""
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise Untrusted("a site's public key is a point of low order; alarm") from error
    return HKDF(algorithm=SHA256(), length=32, salt=context, info=purpose).derive(secret)


def seal(
    key: bytes, about: tuple[bytes, SiteId, SiteId], shares: tuple[bytes, bytes], random: Random
) -> bytes:
    """Return a box with two shares; `about` is the context, the sender and the receiver."""
    nonce = random(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, shares[0] + shares[1], bind("box", *about))


def unseal(key: bytes, about: tuple[bytes, SiteId, SiteId], box: bytes) -> tuple[bytes, bytes]:
    """Return the two shares in a box; raises `Untrusted` unless `about` is what it was made for."""
    try:
        opened = AESGCM(key).decrypt(box[:_NONCE], box[_NONCE:], bind("box", *about))
    except InvalidTag as error:
        raise Untrusted(
            f"the box from {about[1]} does not open: it was changed, or made for another; alarm"
        ) from error
    return opened[:SHARE], opened[SHARE:]
