"""Tests of the written file: its layout, and FFCV's own reader and loader on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.native import libffcv
from pipeline.prepare import prepare
from pipeline.storage.decode import decode
from pipeline.storage.encode import Record, Settings
from pipeline.storage.journal import Journal
from pipeline.storage.writer import PAGE_BYTES, BetonWriter
from tests.pipeline.conftest import pack, parsed_beton, picture, saved


def _written(path: Path, sizes: list[int]) -> SimpleNamespace:
    writer = BetonWriter(path, len(sizes))
    for size in sizes:
        writer.append(Record(b"\x01" * size, RAW, 1, 1, 0), 0)
    writer.close()
    return parsed_beton(path)


@pytest.mark.parametrize(
    ("sizes", "page"),
    [
        ([PAGE_BYTES // 3] * 7, PAGE_BYTES),
        ([PAGE_BYTES, 1, PAGE_BYTES, PAGE_BYTES - 1, 2], PAGE_BYTES),
        ([5, PAGE_BYTES + 1, 5, PAGE_BYTES // 2, PAGE_BYTES // 2 + 1, 2 * PAGE_BYTES], 2 * PAGE_BYTES),
        ([3 * PAGE_BYTES, PAGE_BYTES // 2, PAGE_BYTES], 4 * PAGE_BYTES),
    ],
)
def test_no_record_crosses_a_page_and_none_overlaps_another(sizes: list[int], page: int, tmp_path: Path) -> None:
    file = _written(tmp_path / "x.beton", sizes)
    assert file.page == page
    end = file.end
    for (_, pointer, size), expected in zip(file.places, sizes, strict=True):
        assert size == expected
        assert pointer >= end
        assert pointer // page == (pointer + size - 1) // page
        end = pointer + size
    assert file.table >= end


def test_a_writer_goes_on_after_the_records_in_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their page size, and without the records that were written after them."""
    monkeypatch.setattr("pipeline.storage.writer.BLOCK_IMAGES", 2)
    sizes, path, journal = [5, PAGE_BYTES + 1, 3], tmp_path / "x.beton", Journal.open(tmp_path / "journal")
    journal.begin({})
    writer = BetonWriter(path, len(sizes), journal)
    for size in (*sizes[:2], 1000):
        writer.append(Record(b"\x01" * size, RAW, 1, 1, 0), 0)
    writer.abort()
    journal.close()
    journal = Journal.open(tmp_path / "journal")
    journal.facts()
    writer = BetonWriter(path, len(sizes), journal, resume=True)
    assert (writer.images, writer.count) == (2, 2)
    writer.append(Record(b"\x01" * sizes[2], RAW, 1, 1, 0), 0)
    writer.close()
    _written(tmp_path / "y.beton", sizes)
    assert path.read_bytes() == (tmp_path / "y.beton").read_bytes()


def test_ffcvs_reader_reads_the_file(small: Path) -> None:
    assert libffcv  # imported before ffcv: it restores the number of threads
    from ffcv.reader import Reader

    reader, beton = Reader(str(small)), Beton(small)
    assert reader.field_names == ["image", "label"]
    assert (reader.num_samples, reader.page_size) == (8, PAGE_BYTES)
    assert reader.metadata["f1"].tolist() == beton.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for name, values in (("height", beton.heights), ("width", beton.widths), ("mode", beton.modes)):
        assert reader.metadata["f0"][name].tolist() == values.tolist()
    assert reader.alloc_table["size"].tolist() == beton.sizes.tolist()


# Run in another process: FFCV's loader changes shared types of numba, after which no other code compiles.
FFCV_READS = """
import sys
import numpy as np
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler

Compiler.set_enabled(False)  # its decoders run in Python, in less time than it takes to compile them

side, os_cache = int(sys.argv[2]), sys.argv[3] == "os"
decoders = {"image": [CenterCropRGBImageDecoder((side, side), 1.0)], "label": [IntDecoder()]}
order = OrderOption.SEQUENTIAL
loader = Loader(sys.argv[1], batch_size=3, num_workers=1, order=order, os_cache=os_cache, pipelines=decoders)
batches = [(images.copy(), labels.copy()) for images, labels in loader]
images, labels = (np.concatenate(parts) for parts in zip(*batches))
np.savez(sys.argv[1] + ".npz", images=images, labels=labels)
"""


@pytest.mark.parametrize(
    ("cache", "side"), [pytest.param("process", 1300, marks=pytest.mark.slow), ("os", 40)], ids=["pages", "file"]
)
def test_ffcvs_loader_gives_the_same_pixels_and_labels(cache: str, side: int, tmp_path: Path) -> None:
    """Raw images of 1300 pixels a side take 5 MB each, and the file several pages."""
    kinds = ("jpeg", "bmp")
    files = {f"{'ab'[i // 3]}/{i}.{kinds[i % 2]}": saved(picture(side, side, i), kinds[i % 2]) for i in range(6)}
    source, out = pack("folder", files, tmp_path), tmp_path / "x.beton"
    prepare(str(source), out, Settings(mode="proportion", max_side=0), workers=1, quiet=True)
    beton = Beton(out)
    assert set(beton.modes.tolist()) == {JPEG, RAW}
    assert side < 1300 or beton.pointers.max() > 2 * PAGE_BYTES
    subprocess.run([sys.executable, "-c", FFCV_READS, str(out), str(side), cache], check=True, timeout=120)
    theirs = np.load(f"{out}.npz")
    for index, image in enumerate(theirs["images"].astype(int)):
        gap = np.abs(image - decode(beton, index))  # FFCV decodes JPEGs by libjpeg's fast, rough transform
        assert gap.max() == 0 if beton.modes[index] == RAW else gap.mean() < 2
    assert theirs["labels"].ravel().tolist() == beton.labels.tolist() == [0, 0, 0, 1, 1, 1]
