"""Pictures, packed sources and a small beton for the tests of preparing and reading."""

from __future__ import annotations

import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.manifest import side_files
from pipeline.prepare import prepare
from pipeline.storage.encode import Settings

KINDS = ("folder", "tar", "zip", "deflated zip")


def picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Return a smooth colored picture, which JPEG changes little; another one for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "jpeg", **options: object) -> bytes:
    """Return the bytes of the image as a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """Return a tar of these files."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return archive.getvalue()


def pack(kind: str, files: dict[str, bytes], folder: Path) -> Path:
    """Write the files into `folder` as a source of this kind; return its path."""
    if kind == "folder":
        for name, data in files.items():
            path = folder / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder / "source"
    if kind == "tar":
        (folder / "source.tar").write_bytes(tar_bytes(files))
        return folder / "source.tar"
    method = zipfile.ZIP_DEFLATED if kind == "deflated zip" else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / "source.zip", "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / "source.zip"


def parsed_beton(path: Path) -> SimpleNamespace:
    """Return a beton's header and rows, read with struct from FFCV's description of the format alone."""
    data = path.read_bytes()
    version, fields, page, count, table = struct.unpack_from("<HHIQQ", data)
    start = 24 + 1041 * fields
    rows = [struct.unpack_from("<BHHQ3xq", data, start + 24 * i) for i in range(count)]
    places = list(struct.iter_unpack("<QQQ", data[table:]))
    return SimpleNamespace(
        data=data,
        version=version,
        page=page,
        count=count,
        table=table,
        rows=rows,
        places=places,
        end=start + 24 * count,
    )


def run_command(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run a command's `main` in this process; return its exit status."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process retains its handlers
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code if isinstance(end.value.code, int) else 1


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Run with one torch thread: several take a hundred times as long where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    files = {f"{'ab'[i % 2]}/{i}.jpg": saved(picture(20 + 3 * i, 30 - 2 * i, i)) for i in range(8)}
    source = pack("folder", files, folder)
    prepare(str(source), folder / "small.beton", Settings(mode="proportion"), workers=1, quiet=True)
    return folder / "small.beton"


@pytest.fixture
def small(_small: Path, tmp_path: Path) -> Path:
    """A beton of eight images, JPEG and raw, with its manifest; each test has a copy."""
    for path in (_small, *side_files(_small)):
        shutil.copy(path, tmp_path)
    return tmp_path / _small.name


@pytest.fixture
def bare(small: Path) -> Path:
    """The same beton without its manifest."""
    for path in side_files(small):
        path.unlink()
    return small
