"""Nothing is allowed that the table does not say."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fedml.errors import PermissionDenied
from fedml.identity.access import ALLOWED, Access, Revocations
from fedml.identity.certificates import Identity
from fedml.protocol._generated import fedml_pb2
from fedml.protocol.operations import Role

NOW = 1_800_000_000.0
METHODS = {
    f"{service.name}/{method.name}"
    for service in fedml_pb2.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def who(role: str, name: str = "mercy", serial: int = 7) -> Identity:
    return Identity(name, role, serial, NOW, NOW + 1000)  # type: ignore[arg-type]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return Access(Revocations(tmp_path / "revocations.log"))


def test_the_table_speaks_of_methods_that_exist_and_forgets_none() -> None:
    assert set().union(*ALLOWED.values()) == METHODS - {"Enrolment/Join"}
    assert set(ALLOWED) == set(get_args(Role))


def test_each_role_may_do_its_own_and_nothing_else(access: Access) -> None:
    for role in get_args(Role):
        for method in METHODS:
            if method in ALLOWED[role]:
                access.check(who(role), method, NOW)
            else:
                with pytest.raises(PermissionDenied, match=f"role '{role}' may not call {method}"):
                    access.check(who(role), method, NOW)


def test_a_site_does_not_operate_and_an_operator_does_not_train(access: Access) -> None:
    with pytest.raises(PermissionDenied, match="may not call Operations/Submit; it takes role op"):
        access.check(who("site"), "Operations/Submit", NOW)
    with pytest.raises(PermissionDenied, match="may not call Federation/Connect; it takes role si"):
        access.check(who("operator"), "Federation/Connect", NOW)
    with pytest.raises(PermissionDenied, match="may not call Operations/Release"):
        access.check(who("viewer"), "Operations/Release", NOW)


def test_an_unknown_role_or_method_is_refused(access: Access) -> None:
    with pytest.raises(PermissionDenied):
        access.check(who("root"), "Operations/ListRuns", NOW)
    with pytest.raises(PermissionDenied):
        access.check(who("operator"), "Operations/DropEverything", NOW)


def test_a_certificate_that_expires_during_a_connection_is_refused(access: Access) -> None:
    with pytest.raises(PermissionDenied, match="expired"):
        access.check(who("site"), "Federation/Connect", NOW + 1000)


def test_a_revoked_serial_stays_revoked_and_its_owner_does_not(tmp_path: Path) -> None:
    revocations = Revocations(tmp_path / "r.log")
    revocations.revoke("mercy", NOW + 5, serial=2**150 + 7)
    for known in (revocations, Revocations(tmp_path / "r.log")):
        with pytest.raises(PermissionDenied, match="the certificate of site mercy was revoked"):
            known.check(who("site", serial=2**150 + 7))
        known.check(who("site", serial=8))


def test_a_revoked_name_stays_revoked_after_a_restart(tmp_path: Path) -> None:
    Revocations(tmp_path / "r.log").revoke("mercy", NOW + 5)
    known = Revocations(tmp_path / "r.log")
    with pytest.raises(PermissionDenied):
        known.check(who("site"))
    known.check(who("site", name="charite"))
    known.check(Identity("mercy", "site", 9, NOW + 6, NOW + 1000))
