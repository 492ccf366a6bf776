"""Tests of listings: items as they were added, sorted by name as Python sorts, in constant memory."""

from __future__ import annotations

import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.sources import listing as module
from pipeline.sources.archives import Item
from pipeline.sources.listing import Listing, ListingWriter, Numbers, listed
from pipeline.sources.tables import Row

ITEMS = [
    Item("a/1.jpg", "x.tar", 3, 512, 700),
    Item("b/größe.jpg", "set/b/größe.jpg", -1),
    Item(b"b/caf\xe9.jpg".decode("utf-8", "surrogateescape"), "x.zip", 0, 0, 10, 8, 2**32 - 1, 2**40),
    Row("t.parquet/00000007", "t.parquet", 1, 7, column="image", group=3),
    Item("drawn/00000009.jpg", "", 2, 9),
]


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, runs and buffers of a few rows."""
    monkeypatch.setattr(module, "_FLUSHED_ROWS", 3)
    monkeypatch.setattr(module, "_RUN_ROWS", 7)
    monkeypatch.setattr("pipeline.system.chunks.chunks.__defaults__", (4,))


def _random_items(count: int) -> list[Item]:
    draw = random.Random(0)
    letters = ["a", "Z", "/", "é", "猫", "\U0001f600", "\udce9", " "]
    names = ["".join(draw.choices(letters, k=draw.randrange(1, 5))) for _ in range(count)]
    return [Item(name, "x.tar", draw.randrange(3), index, index) for index, name in enumerate(names)]


@pytest.mark.usefixtures("_small_parts")
def test_items_are_those_that_were_added(tmp_path: Path) -> None:
    images = listed(ITEMS, tmp_path)
    assert list(images) == ITEMS
    assert [images[i] for i in range(-5, 5)] == ITEMS * 2
    assert images[1:4] == ITEMS[1:4]
    assert images[::-2] == ITEMS[::-2]
    assert [images.name_bytes(i) for i in range(5)] == [os.fsencode(item.name) for item in ITEMS]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        images[5]


def test_no_items_are_a_listing() -> None:
    assert list(listed([])) == []
    assert len(ListingWriter().finish([], kept=[], by_name=True)) == 0
    assert listed([]).digest() == listed([]).digest()


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("count", [1, 6, 7, 8, 200])
@pytest.mark.parametrize("kept", [[True] * 3, [True, False, True], [False] * 3])
def test_sorted_labeled_and_kept_items_equal_pythons(count: int, kept: list[bool]) -> None:
    """Also those of equal names, which stay in order."""
    items, labels, writer = _random_items(count), [7, -1, 9], ListingWriter()
    for item in items:
        writer.append(item, item.label)
    images = writer.finish(labels, kept=kept, by_name=True)
    expected = sorted((item for item in items if kept[item.label]), key=lambda item: item.name)
    expected = [replace(item, label=labels[item.label]) for item in expected]
    assert list(images) == expected
    assert images.count_unlabeled() == sum(item.label < 0 for item in expected)
    again = images.relabeled(range(len(expected)))
    assert list(again) == [replace(item, label=label) for label, item in enumerate(expected)]
    order = np.arange(len(expected))[::-3]
    assert list(again.take(order)) == [again[int(i)] for i in order]


def test_the_digest_is_of_all_facts(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"12345")
    items = [Item("a.jpg", str(tar), 0, 512, 700), Item("b.jpg", str(tar), 1, 2048, 9)]

    def digest(*changed: Item) -> str:
        return listed(changed or items).digest()

    others = [
        digest(items[1], items[0]),
        digest(items[0]),
        *(
            digest(replace(items[0], **{name: 7}), items[1])
            for name in ("label", "offset", "size", "crc32", "expanded")
        ),
        digest(replace(items[0], name="c.jpg"), items[1]),
        listed(items).take(np.array([1, 0])).digest(),
        listed(items).relabeled([1, 0]).digest(),
    ]
    assert len({digest(), *others}) == len(others) + 1
    assert digest() == digest()
    before = digest()
    os.utime(tar, (1, 1))
    assert digest() != before


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RUN_ROWS", 500)
    monkeypatch.setattr(module, "_FLUSHED_ROWS", 500)
    peaks = []
    for count in (2000, 6000):
        names = random.Random(0).sample(range(10**8), count)
        tracemalloc.start()
        writer = ListingWriter()
        for index in range(count):
            writer.append(Item(f"class/{names[index]:040}.jpg", "x.tar", 0, index, 1), 0)
        images = writer.finish([0], by_name=True)
        assert isinstance(images, Listing)
        assert images[0].name < images[count // 2].name < images[count - 1].name
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_numbers_are_of_values_and_their_types() -> None:
    numbers = Numbers()
    assert [numbers.of(value) for value in ("a", 1, True, 1.0, "a", None, [1], [1], {"b": 2})] == [
        *(0, 1, 2, 3, 0, 4, 5, 5, 6)
    ]
    assert numbers.values == ["a", 1, True, 1.0, None, [1], {"b": 2}]
