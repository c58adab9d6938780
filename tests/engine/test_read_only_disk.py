"""Engines on a store that lies on a read-only disk, such as a container's volume that its host writes to."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import pytest

import hmi_engine as hmi
from hmi_engine.errors import ReadOnlyStoreError

TEXT = "the cell divides"


@pytest.fixture
def mount_read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Shows a folder at another, read-only path; needs the right to mount."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        target = tmp_path / "read-only"
        target.mkdir()
        try:
            bound = subprocess.run(
                ["mount", "--bind", folder, target], capture_output=True, check=False, text=True
            )
        except OSError as error:
            pytest.skip(f"mount cannot be run: {error}")
        if bound.returncode:
            pytest.skip(f"no right to mount: {bound.stderr.strip()}")
        mounted.append(target)
        subprocess.run(["mount", "-o", "remount,ro,bind", target], check=True)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", "--lazy", target], check=True)  # tables may still be mapped


def add_tenant(store: hmi.Store, name: str, make_head: Callable[..., hmi.ClassificationHead]) -> None:
    store.add_tenant(name, domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))


def answers(folder: Path, *tenants: str) -> Future[list[hmi.Response]]:
    """Those of an engine on the store, which is given a thread of its own: it might never end."""
    future: Future[list[hmi.Response]] = Future()

    def run() -> None:
        try:
            with hmi.Store.open(folder, read_only=True) as store, hmi.Engine(store) as engine:
                future.set_result(engine.run([hmi.Request(tenant, TEXT) for tenant in tenants]))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def test_a_store_that_was_read_before_its_disk_became_read_only(store, mount_read_only, make_head) -> None:
    """Readers leave SQLite's shared memory behind, which cannot be used there: each reading sees a change."""
    add_tenant(store, "t", make_head)
    root = store.layout.root
    store.close()
    (expected,) = answers(root, "t").result(60)
    (found,) = answers(mount_read_only(root), "t").result(60)
    assert found.error is None
    assert found.scores == expected.scores
    with pytest.raises(ReadOnlyStoreError):
        hmi.Store.open(root.parent / "read-only")


@pytest.mark.parametrize("is_open", [True, False])
def test_what_others_write_is_seen_on_a_read_only_disk(store, mount_read_only, make_head, is_open) -> None:
    """Also by who opened the store while nobody had it open for writing."""
    add_tenant(store, "t", make_head)
    shown = mount_read_only(store.layout.root)
    root = store.layout.root
    if not is_open:
        store.close()
    with hmi.Store.open(shown, read_only=True) as reader, hmi.Engine(reader) as engine:
        assert engine.run([hmi.Request("t", TEXT)])[0].error is None
        with hmi.Store.open(root) as writer:
            add_tenant(writer, "later", make_head)
        first, later = engine.run([hmi.Request("t", TEXT), hmi.Request("later", TEXT)])
        assert first.error is None and later.error is None
        assert later.scores == first.scores
