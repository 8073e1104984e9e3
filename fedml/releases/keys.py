"""The release repository's signing keys, one Ed25519 file each, named by key id."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from fedml import durable
from fedml.errors import ConfigError


class Keys:
    """A folder, mode 700, of PEM files, mode 600. Root's may lie elsewhere until it must sign."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> SSlibKey:
        """Generate a key, on the disk when this returns; give its public half."""
        signer = CryptoSigner.generate_ed25519()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(signer.public_key.keyid)
        durable.replace(path, signer.private_bytes, mode=0o600)
        return signer.public_key

    def signer(self, key: SSlibKey) -> CryptoSigner:
        """Return the private half; raises `ConfigError` if it is not here or damaged."""
        path = self._path(key.keyid)
        try:
            return CryptoSigner(load_pem_private_key(path.read_bytes(), None), key)
        except FileNotFoundError as error:
            raise ConfigError(f"signing key {path} is not here; bring it back to sign") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"signing key {path}: {error}; restore it from a backup") from error

    def forget(self, keyid: str) -> None:
        """Delete a private key that counts no more."""
        self._path(keyid).unlink(missing_ok=True)

    def _path(self, keyid: str) -> Path:
        return self.folder / f"{keyid}.pem"
