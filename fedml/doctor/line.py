"""The doctor looks at the way to the coordinator: name, port, TLS, and what a Ping says."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from fedml import __version__
from fedml.doctor.finding import Finding, is_sound
from fedml.errors import FedmlError, OtherVersion
from fedml.identity.certificates import SKEW, Credentials
from fedml.protocol.requests import Pong
from fedml.transport.rpc import GrpcLink

PATIENCE = 10.0  # seconds for each step
_DRIFT = 30.0  # seconds off that are worth a word
_UNTIMED = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME
_NOT_YET, _EXPIRED, _OTHER_NAME = 9, 10, (62, 64)  # OpenSSL's X509_V_ERR_...
_FIREWALL = "is the coordinator running, and does your firewall let this machine dial out to it?"
_SET_CLOCK = "set this machine's clock (timedatectl set-ntp true), or the coordinator's"


async def line(
    papers: Credentials, clock: Callable[[], float], *, sound: bool = True
) -> list[Finding]:
    """Look at the way to the coordinator, step by step, until one fails.

    The last step, to ask it something, takes papers that are `sound`.
    """
    findings = [await asyncio.to_thread(_dial, papers, clock)]
    if sound and is_sound(findings):
        findings += await _ask(papers, clock)
    if not any(finding.what == "clock" for finding in findings):
        findings.append(Finding("warn", "clock", "not compared: the coordinator did not answer"))
    return findings


def _dial(papers: Credentials, clock: Callable[[], float]) -> Finding:
    host, _, port = papers.address.rpartition(":")
    host = host.strip("[]")
    if not (host and port.isdecimal() and int(port) < 65536):
        found = f"identity.json names {papers.address!r:.80}, which is no host:port"
        return Finding("fail", "coordinator", found, "restore it from a backup, or join again")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        found = f"{host} does not resolve: {getattr(error, 'strerror', error)}"
        return Finding("fail", "coordinator", found, "mend DNS or /etc/hosts, or join anew")
    try:
        context = _context(papers.ca)
    except (ValueError, TypeError, ssl.SSLError):
        found = "identity.json has no certificate of an authority"
        return Finding("fail", "coordinator", found, "restore it from a backup, or join again")
    try:
        _shake(host, int(port), context)
    except ssl.SSLCertVerificationError as error:
        return _mistrust(error, papers, host, int(port), clock())
    except ssl.SSLError as error:
        found = f"{papers.address} speaks no TLS of ours: {error.reason}"
        return Finding("fail", "coordinator", found, "is that another program, or a proxy?")
    except OSError as error:  # refused, unreachable, timed out
        found = f"{papers.address} does not answer: {error.strerror or error}"
        return Finding("fail", "coordinator", found, _FIREWALL)
    found = f"{papers.address} answers with a certificate of our authority"
    return Finding("ok", "coordinator", found)


def _context(ca: bytes, *, timed: bool = True) -> ssl.SSLContext:
    """Return terms that trust `ca` alone; without `timed`, certificates out of their time too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.decode())
    context.set_alpn_protocols(["h2"])
    if not timed:
        context.verify_flags |= ssl.VerifyFlags(_UNTIMED)
    return context


def _shake(host: str, port: int, context: ssl.SSLContext) -> dict[str, object]:
    """Shake hands as a newcomer does, and return the server's certificate."""
    with (
        socket.create_connection((host, port), PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        return dict(tls.getpeercert() or {})


def _mistrust(
    error: ssl.SSLCertVerificationError, papers: Credentials, host: str, port: int, now: float
) -> Finding:
    """Say what a failed verification means; which of the clocks is wrong, too."""
    if error.verify_code in _OTHER_NAME:
        found = f"{papers.address} has a certificate for another name"
        advice = "dial the name in the coordinator's coordinator.toml, host, or join anew"
        return Finding("fail", "coordinator", found, advice)
    if error.verify_code not in (_NOT_YET, _EXPIRED):
        found = f"{papers.address} has no certificate of our authority: {error.verify_message}"
        advice = "another federation's coordinator, or a proxy that opens TLS: ask its operator"
        return Finding("fail", "coordinator", found, advice)
    try:
        shown = _shake(host, port, _context(papers.ca, timed=False))
    except OSError as again:
        return Finding.of("coordinator", again)
    key = "notBefore" if error.verify_code == _NOT_YET else "notAfter"
    edge = ssl.cert_time_to_seconds(str(shown[key]))
    begins = "begins" if error.verify_code == _NOT_YET else "ended"
    found = f"here it is {_utc(now)}, and the coordinator's certificate {begins} {_utc(edge)}"
    advice = _SET_CLOCK
    if error.verify_code == _EXPIRED:
        advice += "; if they are right, restart it: each start makes a certificate for a year"
    return Finding("fail", "clock", found, advice)


async def _ask(papers: Credentials, clock: Callable[[], float]) -> list[Finding]:
    link = GrpcLink(papers)
    try:
        async with asyncio.timeout(PATIENCE):
            before = clock()
            pong = await link.ping()
            after = clock()
    except TimeoutError:
        return [Finding("fail", "access", f"no answer within {PATIENCE:.0f} s", _FIREWALL)]
    except OtherVersion:  # it has no such call
        return [Finding("warn", "version", "the coordinator is older than this command")]
    except FedmlError as error:
        return [Finding.of("access", error)]
    finally:
        await link.close()
    return [Finding("ok", "access", "our certificate is taken"), *judge(pong, before, after)]


def judge(pong: Pong, before: float, after: float) -> list[Finding]:
    """Return what an answer says that was asked for and came at these times of our clock."""
    off = (before + after) / 2 - pong.time
    way = "ahead of" if off > 0 else "behind"
    found = f"{abs(off):.1f} s {way} the coordinator's, give or take {(after - before) / 2:.1f} s"
    if abs(off) > SKEW:
        found += f"; certificates bear {SKEW:.0f} s"
        time = Finding("fail", "clock", found, _SET_CLOCK)
    elif abs(off) > _DRIFT:
        time = Finding("warn", "clock", found, _SET_CLOCK)
    else:
        time = Finding("ok", "clock", found)
    return [time, _version(pong.version)]


def _version(theirs: str) -> Finding:
    found = f"fedml {__version__} here, {theirs} at the coordinator"
    if __version__.split(".")[:2] == theirs.split(".")[:2]:
        return Finding("ok", "version", found)
    advice = "they work together as far as each knows the other's words; upgrade the older one"
    return Finding("warn", "version", found, advice)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
