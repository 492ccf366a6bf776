"""The files of a tar by its headers: ustar, GNU's long names, PAX.

Compiled code reads the headers of plain files, whether their names are in the header, in a GNU long name or in a PAX
header. Python's tarfile, ten times as slow, reads all else: folders, devices, links, sparse files, global headers,
sizes that are not octal, and damaged headers, so that faults are tarfile's.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.native.numba_cache import compiled

_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1 << 20
_MIN_WINDOW_BYTES, _MAX_WINDOW_BYTES = 1 << 12, 1 << 16
_NEAR_BYTES = 1 << 15  # a gap between windows that is read rather than skipped
_NO_NUMBER = -1
_KEY_PATH, _KEY_SIZE = np.frombuffer(b"path=", np.uint8), np.frombuffer(b"size=", np.uint8)
_KEY_SPARSE = np.frombuffer(b"GNU.sparse", np.uint8)


class TarPart:
    """Bytes `start` to `start + size` of a file: a tar. It is also a file object, from which tarfile reads headers.

    Read in windows, which grow while headers lie close together: of large members only the headers are read. Not
    mapped: a file that shrinks meanwhile would end the process.
    """

    def __init__(self, file: int, start: int, size: int) -> None:
        self._file, self._start, self.size, self._at = file, start, size, 0
        self._window, self._first = b"", 0

    def window(self, at: int, least: int = _MIN_WINDOW_BYTES) -> bytes:
        """Return `least` bytes or more from `at` on; fewer at the end."""
        begin, length = at - self._first, len(self._window)
        if begin < 0 or begin + least > length:
            near = 0 <= begin <= length + _NEAR_BYTES
            wanted = max(min(2 * length, _MAX_WINDOW_BYTES) if near else 0, least)
            self._window = os.pread(self._file, min(wanted, max(self.size - at, 0)), self._start + at)
            self._first, begin = at, 0
        return self._window[begin:] if begin else self._window

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes. Raises ReadError for too many: a header states its own length."""
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count} bytes")
        data = self.window(self._at, count)[:count]
        self._at += len(data)
        return data

    def seek(self, at: int) -> None:
        """Read from `at` on."""
        self._at = at

    def tell(self) -> int:
        """Return the place of the next byte to read."""
        return self._at


def files(part: TarPart) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and size of the files of a tar.

    Raises TarError and others, as tarfile does, for a damaged or missing header or end.
    """
    archive, at = tarfile.TarFile(fileobj=part, encoding="utf-8"), 0  # type: ignore[arg-type]
    rows = np.empty((_MAX_WINDOW_BYTES // _BLOCK, 6), np.int64)
    while True:
        if not any(key in ("path", "size") or key.startswith("GNU.sparse") for key in archive.pax_headers):
            window = part.window(at)
            count, skip = scan(np.frombuffer(window, np.uint8), part.size - at, rows)
            for start, end, prefix, prefix_end, offset, size in rows[:count].tolist():
                name = window[prefix:prefix_end] + b"/" + window[start:end] if prefix else window[start:end]
                yield name.decode("utf-8", "surrogateescape"), at + offset, size
            at += skip
            if count:
                continue
        part.seek(at)
        archive.offset, archive.firstmember, archive.members = at, None, []  # type: ignore[attr-defined]
        if (member := archive.next()) is None:
            break
        if member.islnk() or member.issym():
            raise tarfile.ReadError(f"{member.name} is a link: pack the files themselves, with tar --dereference")
        if member.issparse():
            raise tarfile.ReadError(f"{member.name} is sparse: pack it without tar's --sparse")
        if archive.offset <= at or (member.isfile() and not 0 <= member.size <= part.size - member.offset_data):
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        at = archive.offset
        if member.isfile():
            yield member.name, member.offset_data, member.size
    if part.window(at, _BLOCK)[:_BLOCK] != bytes(_BLOCK):
        raise tarfile.ReadError(f"no member and no end at byte {at}")


@compiled(nogil=True, boundscheck=False)
def scan(data: Any, limit: int, rows: Any) -> tuple[int, Any]:
    """Read the headers of plain files from the start of `data` on, up to another member, or the end of `data`.

    limit: bytes from there to the tar's end. rows: int64 [N, 6]; of each file, first byte and end of its name, the same
    of the prefix that goes before it, or 0, 0; first byte of its content, and its size.
    Returns the number of files, and the place of the next header.
    """
    count, at = 0, np.int64(0)
    while count < len(rows) and at + _BLOCK <= data.size and _intact(data, at):
        header, kind, size = at, data[at + 156], np.int64(_NO_NUMBER)
        first, end = np.int64(0), np.int64(0)
        if kind == ord("L") or kind == ord("x"):
            length, begin = _octal(data, at + 124, 12), at + _BLOCK
            header = begin + _padded(length)
            if length < 0 or length > _MAX_HEADER_BYTES or header + _BLOCK > data.size or not _intact(data, header):
                break
            if kind == ord("L"):
                first, end = begin, _text_end(data, begin, header - begin)
            else:
                plain, first, end, size = _pax(data, begin, begin + length)
                if not plain:
                    break
            kind = data[header + 156]
        stop = _text_end(data, header, 100)
        if (kind != ord("0") and kind != 0) or (kind == 0 and stop > header and data[stop - 1] == ord("/")):
            break
        if size == _NO_NUMBER:
            size = _octal(data, header + 124, 12)
        offset = header + _BLOCK
        if size < 0 or size > limit - offset:
            break
        prefix = prefix_end = np.int64(0)
        if end == 0:
            first, end = header, stop
            if data[header + 345] != 0:
                prefix, prefix_end = header + 345, _text_end(data, header + 345, 155)
        row = rows[count]
        row[0], row[1], row[2], row[3], row[4], row[5] = first, end, prefix, prefix_end, offset, size
        count += 1
        at = offset + _padded(size)
    return count, at


@compiled(nogil=True, boundscheck=False)
def _padded(size: Any) -> Any:
    return (size + _BLOCK - 1) // _BLOCK * _BLOCK


@compiled(nogil=True, boundscheck=False)
def _text_end(data: Any, at: Any, length: Any) -> Any:
    """Return the end of the text at `at`: its first NUL, at most `length` bytes after."""
    end = at
    while end < at + length and data[end] != 0:
        end += 1
    return end


@compiled(nogil=True, boundscheck=False)
def _octal(data: Any, at: Any, length: Any) -> Any:
    """Return the octal number in a field, padded by spaces and ended by NUL or the field; -1 for anything else."""
    end = _text_end(data, at, length)
    while at < end and data[at] == ord(" "):
        at += 1
    while at < end and data[end - 1] == ord(" "):
        end -= 1
    number = np.int64(0)
    for i in range(at, end):
        if data[i] < ord("0") or data[i] > ord("7"):
            return np.int64(_NO_NUMBER)
        number = number * 8 + np.int64(data[i] - ord("0"))
    return number


@compiled(nogil=True, boundscheck=False)
def _intact(data: Any, at: Any) -> Any:
    """Return whether a header's checksum is that of its bytes, and it is not empty."""
    total, checksum = np.int64(0), np.int64(0)
    for i in range(at, at + _BLOCK):
        total += data[i]
    for i in range(at + 148, at + 156):
        checksum += data[i]
    return total > 0 and _octal(data, at + 148, 8) == total - checksum + 8 * ord(" ")


@compiled(nogil=True, boundscheck=False)
def _pax(data: Any, at: Any, end: Any) -> tuple[Any, Any, Any, Any]:
    """Read PAX records "LENGTH KEY=VALUE": first byte and end of the path, or 0, 0, and the size, or -1.

    The first value is whether compiled code can read the member: no record is malformed, or says that it is sparse.
    """
    path, path_end, size = np.int64(0), np.int64(0), np.int64(_NO_NUMBER)
    while at < end:
        length, key = np.int64(0), at
        while key < min(at + 7, end) and ord("0") <= data[key] <= ord("9"):
            length, key = length * 10 + np.int64(data[key] - ord("0")), key + 1
        stop = at + length
        if key == at or data[key] != ord(" ") or stop > end or data[stop - 1] != ord("\n"):
            return False, path, path_end, size
        key += 1
        value = key
        while value < stop and data[value] != ord("="):
            value += 1
        if value == key or value >= stop - 1:
            return False, path, path_end, size
        if _begins(data, key, _KEY_SPARSE):
            return False, path, path_end, size
        is_path, is_size = _begins(data, key, _KEY_PATH), _begins(data, key, _KEY_SIZE)
        value += 1
        if is_path:
            path, path_end = value, stop - 1
            while path_end > path and data[path_end - 1] == ord("/"):
                path_end -= 1
        elif is_size:
            size = np.int64(0)
            for i in range(value, stop - 1):
                if data[i] < ord("0") or data[i] > ord("9") or i - value > 17:
                    return False, path, path_end, size
                size = size * 10 + np.int64(data[i] - ord("0"))
        at = stop
    return True, path, path_end, size


@compiled(nogil=True, boundscheck=False)
def _begins(data: Any, at: Any, text: Any) -> Any:
    """Return whether `text` is at that place of `data`, of which a header of 512 bytes more follows."""
    same = True
    for i in range(len(text)):
        same = same and data[at + i] == text[i]
    return same
