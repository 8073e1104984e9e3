"""A site's side of trust: what it believes about releases, and how it makes sure.

The site was handed root metadata when it joined. From there The Update Framework decides what is
genuine, current and complete; this module asks it, adds two checks of our own (a channel's rev
never falls, the manifest is the one the channel names), and gives each failure one clear line.

Nothing here touches what is being served: expired metadata stop updates, never predictions.
All calls block; a daemon makes them from a thread.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from fedml import durable
from fedml.errors import ConfigError, Untrusted
from fedml.protocol.messages import Blob, check_name
from fedml.releases.manifest import MANIFEST, Channel, Manifest, fingerprint, is_whole

Fetch = Callable[[str, int], bytes | None]
"""Returns a small file by the name `signing.Repository.file` knows it by, None if there is none;
stops reading after so many bytes. Raises `Unreachable`."""
Download = Callable[[Blob], Path]
"""Returns where a file with this digest and size lies; raises `Unreachable`."""

_METADATA_LIMIT = 5_000_000  # bytes; the largest file TUF may ask for
_REASONS: Mapping[type[Exception], str] = {
    ExpiredMetadataError: "the release metadata have expired; updates wait until the coordinator "
    "signs anew, what is served stays",
    UnsignedMetadataError: "a signature is missing or from a key this site does not trust",
    BadVersionNumberError: "the release metadata are older than, or not of, what was seen before",
    LengthOrHashMismatchError: "a file is not the one that was signed",
    DownloadLengthMismatchError: "a file is longer than the one that was signed",
}


class Trust:
    """Decides which release of a model is genuine and current, and gets it whole.

    `root` is the metadata from enrolment; later roots count only if it leads to them.
    """

    def __init__(self, folder: Path, root: bytes, fetch: Fetch, download: Download) -> None:
        self.folder, self._root, self._fetch, self._download = folder, root, fetch, download
        self._updater: Updater | None = None
        self._lock = threading.RLock()  # one updater at a time may use its folder

    def refresh(self) -> None:
        """Learn what the coordinator now vouches for.

        Raises `Untrusted` if any of it does not add up, `Unreachable` if it cannot be had.
        """
        folder = self.folder / "metadata"
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock, _explained("refreshing"):
            self._updater = None
            updater = Updater(str(folder), "", fetcher=_Fetcher(self._fetch), bootstrap=self._root)
            updater.refresh()
            self._updater = updater

    def current(self, model: str) -> Channel | None:
        """Return the release that sites shall serve of `model`, None before the first.

        Looks at the last `refresh`, or does the first one. Raises `Untrusted` if the channel
        names an older rev than it did before, or has gone.
        """
        check_name("model", model)
        with self._lock:
            target = self._target(f"channels/{model}.json")
            seen = self._seen(model)
            if target is None:
                if seen:
                    raise Untrusted(f"channel {model}: gone, after rev {seen.rev} was seen")
                return None
            data = self._read(target)
            channel = Channel.decode(data)
            if channel.model != model:
                raise Untrusted(f"channel {model}: holds the channel of {channel.model}")
            if seen and (channel.rev < seen.rev or (channel.rev == seen.rev and channel != seen)):
                raise Untrusted(
                    f"channel {model}: rev {channel.rev} names version {channel.version}, after "
                    f"rev {seen.rev} named version {seen.version}; revs only go forward"
                )
            durable.replace(self._note(model), data)
            return channel

    def obtain(self, model: str) -> Path:
        """Return a folder with the current bundle of `model`, each file checked.

        Only the last bundle of a model is kept here. Raises `Untrusted` for a file or manifest
        that is not what was signed, `ConfigError` if nothing of the model is published.
        """
        with self._lock:
            channel = self.current(model)
            if channel is None:
                raise ConfigError(f"no release of {model!r} is published; publish one first")
            folder = self.folder / "bundles" / model / str(channel.version)
            if not is_whole(folder, channel.digest):
                shutil.rmtree(folder.parent, ignore_errors=True)
                self._gather(channel, folder)
            return folder

    def _gather(self, channel: Channel, folder: Path) -> None:
        prefix = f"models/{channel.model}/{channel.version}"
        signed = self._signed(f"{prefix}/{MANIFEST}")
        if signed.digest != channel.digest:
            raise Untrusted(
                f"{prefix}: the channel names release {channel.digest[:12]}, the signed manifest "
                f"is {signed.digest[:12]}"
            )
        draft = folder.with_name(f".{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        self._take(signed, draft / MANIFEST)
        manifest = Manifest.decode((draft / MANIFEST).read_bytes())
        if (manifest.model, manifest.version) != (channel.model, channel.version):
            raise Untrusted(f"{prefix}: holds the manifest of {manifest.model}/{manifest.version}")
        for name, blob in manifest.files.items():
            if self._signed(f"{prefix}/{name}") != blob:
                raise Untrusted(f"{prefix}/{name}: manifest and signature name different files")
            self._take(blob, draft / name)
        draft.rename(folder)
        durable.sync_folder(folder.parent)

    def _take(self, blob: Blob, path: Path) -> None:
        durable.copy(self._download(blob), path)
        found = fingerprint(path)  # of the copy: what was downloaded may change under us
        if found != blob:
            raise Untrusted(
                f"{path.name}: downloaded {found.size} bytes {found.digest[:12]}, signed are "
                f"{blob.size} bytes {blob.digest[:12]}; a file is not the one that was signed"
            )

    def _signed(self, path: str) -> Blob:
        target = self._target(path)
        if target is None or "sha256" not in target.hashes:
            raise Untrusted(f"{path}: not signed, though the release needs it")
        try:
            return Blob(target.hashes["sha256"], target.length)
        except ConfigError as error:
            raise Untrusted(f"{path}: signed with {error}") from error

    def _target(self, path: str) -> TargetFile | None:
        if self._updater is None:
            self.refresh()
        assert self._updater is not None
        with _explained(path):
            return self._updater.get_targetinfo(path)

    def _read(self, target: TargetFile) -> bytes:
        with _explained(target.path):
            name = target.get_prefixed_paths()[0]
            data = self._fetch(name, target.length)
            if data is None:
                raise Untrusted(f"{target.path}: signed, but the coordinator does not have it")
            target.verify_length_and_hashes(data)
            return data

    def _note(self, model: str) -> Path:
        return self.folder / "channels" / f"{model}.json"

    def _seen(self, model: str) -> Channel | None:
        note = self._note(model)
        return Channel.decode(note.read_bytes()) if note.exists() else None


class _Fetcher(FetcherInterface):
    """TUF's way to the coordinator. It asks by URL; ours are bare names."""

    def __init__(self, fetch: Fetch) -> None:
        self._get = fetch

    def _fetch(self, url: str) -> Iterator[bytes]:
        # a generator: what `fetch` raises, Unreachable say, then reaches our caller as it is
        name = url.removeprefix("/")
        data = self._get(name, _METADATA_LIMIT)
        if data is None:
            raise DownloadHTTPError(f"the coordinator has no {name}", 404)
        yield data


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryError, DownloadError) as error:
        reason = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), "")
        detail = re.sub(r"\s+", " ", str(error))[:200]
        raise Untrusted(f"{what}: {reason or 'malformed or missing'} ({detail})") from error
    except OSError as error:
        raise ConfigError(f"{what}: {error}; the trust folder must be writable") from error
