from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from fedml import durable
from fedml.errors import ConfigError, Corrupt, Untrusted
from fedml.releases.manifest import open_bundle
from fedml.releases.session import rehearse
from fedml.releases.shelf import Shelf
from tests.bundles import write_bundle


def shelve(shelf: Shelf, version: int, factor: float = 1.0) -> None:
    folder = shelf.folder.parent / f"b{version}"
    write_bundle(folder, version=version, factor=factor)
    shelf.add(folder)


def test_activate_keeps_the_release_before_and_no_more(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    for version in (1, 2, 3):
        shelve(shelf, version)
        shelf.activate("heart", version, rehearse)
    pointer = shelf.current("heart")
    assert pointer and pointer.previous
    assert (pointer.current.version, pointer.previous.version) == (3, 2)
    kept = {path.name for path in (shelf.folder / "heart").iterdir() if path.is_dir()}
    assert kept == {"2", "3"}


def test_back_returns_once_and_then_says_no(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    for version in (1, 2):
        shelve(shelf, version)
        shelf.activate("heart", version, rehearse)
    assert shelf.back("heart").current.version == 1
    with pytest.raises(ConfigError, match="nothing to go back to"):
        shelf.back("heart")


def test_activating_the_current_release_again_changes_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    for version in (1, 2, 2, 2):
        shelve(shelf, version)
        shelf.activate("heart", version, rehearse)
    pointer = shelf.current("heart")
    assert pointer and pointer.previous and pointer.previous.version == 1


def test_a_golden_mismatch_leaves_the_old_release_current(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelve(shelf, 1)
    shelf.activate("heart", 1, rehearse)
    write_bundle(tmp_path / "bad", version=2, golden_error=0.01)
    shelf.add(tmp_path / "bad")
    with pytest.raises(Untrusted, match="golden inputs differently"):
        shelf.activate("heart", 2, rehearse)
    pointer = shelf.current("heart")
    assert pointer and pointer.current.version == 1


def test_a_damaged_bundle_is_neither_added_nor_activated(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    write_bundle(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").write_bytes(b"x")
    with pytest.raises(Untrusted):
        shelf.add(tmp_path / "b")
    assert not (shelf.folder / "heart" / "1").exists()
    shelve(shelf, 1)
    (shelf.bundle("heart", 1) / "model.onnx").write_bytes(b"x")
    with pytest.raises(Untrusted):
        shelf.activate("heart", 1, rehearse)


def test_a_damaged_copy_is_replaced_by_adding_again(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelve(shelf, 1)
    (shelf.bundle("heart", 1) / "model.onnx").write_bytes(b"x")
    shelve(shelf, 1)
    shelf.activate("heart", 1, rehearse)


def test_the_current_version_cannot_be_replaced_by_another_of_its_number(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelve(shelf, 1)
    shelf.activate("heart", 1, rehearse)
    with pytest.raises(Untrusted, match="never used twice"):
        shelve(shelf, 1, factor=2.0)


def test_a_damaged_pointer_is_corrupt_not_absent(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelve(shelf, 1)
    shelf.activate("heart", 1, rehearse)
    for junk in (b"", b"[]", b'{"version": 1}', b'{"version":0,"digest":"","previous":null}'):
        (shelf.folder / "heart" / "current.json").write_bytes(junk)
        with pytest.raises(Corrupt):
            shelf.current("heart")


def test_names_from_outside_do_not_leave_the_shelf(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    for name in ("..", "../x", "/etc", "", "A B"):
        with pytest.raises(ConfigError):
            shelf.current(name)


def _die_at(folder: Path, step: int) -> None:
    """Add and activate version 2, and be killed at the `step`-th change to the disk."""
    left = [step]

    def dying(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            if not left[0]:
                os.kill(os.getpid(), 9)
            left[0] -= 1
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    for module, name in (
        (durable, "replace"), (durable, "copy"), (durable, "sync_folder"),
        (shutil, "rmtree"), (Path, "rename"), (os, "fsync"), (Path, "replace"),
    ):  # fmt: skip
        setattr(module, name, dying(getattr(module, name)))
    shelf = Shelf(folder / "shelf")
    shelf.add(folder / "b2")
    shelf.activate("heart", 2, lambda _: None)


def test_kill_at_any_step_of_an_update_leaves_a_whole_release_current(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b2", version=2)
    shelf = Shelf(tmp_path / "shelf")
    for version in (0, 1):  # so that there is something to prune
        shelve(shelf, version + 10)
        shelf.activate("heart", version + 10, rehearse)
    spawn = multiprocessing.get_context("fork")
    seen = []
    for step in range(200):
        child = spawn.Process(target=_die_at, args=(tmp_path, step))
        child.start()
        child.join()
        pointer = shelf.current("heart")
        assert pointer
        folder = shelf.bundle("heart", pointer.current.version)
        open_bundle(folder, pointer.current.digest)
        new = shelf.folder / "heart" / "2"
        assert not new.exists() or open_bundle(new)  # whole, or not there by that name
        seen.append(pointer.current.version)
        if child.exitcode == 0:
            break
        assert child.exitcode == -9
    assert seen[0] == 11 and seen[-1] == 2 and seen == sorted(seen, reverse=True)
    assert len(seen) > 10
    kept = {path.name for path in (shelf.folder / "heart").iterdir() if path.is_dir()}
    assert kept == {"2", "11"}
