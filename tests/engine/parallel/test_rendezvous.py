"""Ranks meet at the launcher's store: those of this launch, and no others."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from engine.parallel import rendezvous
from engine.parallel.rendezvous import cores_per_rank, local_rank, local_world, rank, world
from pipeline.system.errors import InputError
from tests.gloo import on_ranks


def test_rank_and_world_size_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), world(), local_rank(), local_world()) == (0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "available_cores", lambda: 10)
    assert (rank(), world(), local_rank(), local_world(), cores_per_rank()) == (5, 8, 1, 4, 2)


def join(out: str) -> None:
    """Join at a store that still contains the keys of an ended launch, of two ranks."""
    shared = distributed.TCPStore("127.0.0.1", int(Path(out, "port").read_text()), is_master=False)
    Path(out, str(rank())).write_text(rendezvous._agree_on_prefix(shared))


def test_ranks_ignore_the_keys_of_an_ended_launch(tmp_path: Path) -> None:
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in {"call": "old", "old/world": "3", "old/answer/1": "other", "old/confirmed/other": ""}.items():
        server.set(f"millrace/{key}", value)
    (tmp_path / "port").write_text(str(server.port))
    on_ranks(3, join, str(tmp_path))
    names = {(tmp_path / str(number)).read_text() for number in range(3)}
    assert len(names) == 1
    assert names != {"old"}


def test_another_world_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = distributed.HashStore()
    store.set("millrace/call", "name")
    store.set("millrace/name/world", "2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="WORLD_SIZE: rank 0 has 2, rank 2 3: give all ranks the same"):
        rendezvous._agree_on_prefix(store)


def test_late_rank_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.2)
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    late = distributed.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=9))
    threading.Timer(0.7, lambda: late.set("key", "value")).start()
    assert rendezvous.wait_for(server, "key", 1) == "value"
    assert capsys.readouterr().err == "waiting for rank 1 of 2\n"
    with pytest.raises(InputError, match=r"rank 1 of 2 has not answered for \d+ s: see its own output"):
        rendezvous.wait_for(server, "other", 1, seconds=0.5)
