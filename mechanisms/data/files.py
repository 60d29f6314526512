"""What a data file is, told by its first bytes: the content of packed ones as a stream, the rows of tables, and advice
for those that are not read."""

import bz2
import csv
import gzip
import io
import itertools
import re
import sys
from collections.abc import Iterator
from typing import BinaryIO

_ROWS = 500  # of a table in memory at once, as Python objects
# First bytes of files that are not read: what the file is, and what to do.
_FOREIGN = {
    b"\xff\xfe\0\0": ("UTF-32, not UTF-8", "Convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    b"\xff\xfe": ("UTF-16, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"PAR1": ("a packed parquet file", "Unpack it first"),
    b"PARE": ("an encrypted parquet file", "Write it again without encryption"),
    b"ARROW1": ("a packed arrow file", "Unpack it first"),
    b"\x1f\x8b": ("a file packed twice", "Unpack it first"),
    b"BZh": ("a file packed twice", "Unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a file packed twice", "Unpack it first"),
    b"FEA1": ("a Feather file of version 1", "Convert it: python -c \"import pyarrow.feather as f; "
              "f.write_feather(f.read_table('FILE'), 'NEW.arrow', 'uncompressed')\""),
    b"ORC": ("an ORC file", "Convert it: python -c \"import pyarrow.orc as o, pyarrow.parquet as p; "
             "p.write_table(o.read_table('FILE'), 'NEW.parquet')\""),
    b"\xfd7zXZ\0": ("an xz file", "Unpack it: xz -dk FILE"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x FILE"),
    b"Rar!": ("a RAR archive", "Unpack it: unrar x FILE"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook (XLS)", "Save it as CSV UTF-8"),
    b"SQLite format 3\0": ("an SQLite database", "Export the table: sqlite3 -json FILE 'select * from TABLE' > NEW"),
    b"Obj\x01": ("an Avro file", "Convert it to JSON Lines"),
    b"\x89HDF": ("an HDF5 file", "Convert it to JSON Lines"),
    b"\x93NUMPY": ("a NumPy file", "Convert it to JSON Lines"),
    b"%PDF": ("a PDF document", "Give JSON, CSV or parquet"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "Fetch the data: git lfs pull"),
    b"<": ("HTML or XML", "Was a web page saved instead of the data? Download the file itself"),
}


class Unreadable(Exception):
    """A file that cannot be read. args[0]: what is wrong with it and what to do."""


def open_unpacked(path: str) -> BinaryIO:
    """The content of a file, unpacked if it is gzip, bzip2 or zstd. Raises OSError, and later EOFError or zlib.error.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"BZh"):
        return bz2.open(path)
    if head == b"\x28\xb5\x2f\xfd":
        import pyarrow  # takes a while to import

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), 1 << 16)
    return open(path, "rb")


def foreign(head: bytes) -> str | None:
    """What a file is that begins so, and what to do about it; None for text in UTF-8 or an encoding like it."""
    start = head.lstrip()
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"xl/" in head:
            return "an Excel workbook (XLSX). Save it as CSV UTF-8"
        return "a zip archive. Unpack it: unzip FILE"
    if head[257:262] == b"ustar":
        return "a tar archive. Unpack it: tar -xf FILE"
    for first, (what, advice) in _FOREIGN.items():
        if (start if first == b"<" else head).startswith(first):
            return f"{what}. {advice}"
    for order, zeros, others in (("LE", head[1::2], head[::2]), ("BE", head[::2], head[1::2])):
        if len(zeros) > 1 and zeros.count(0) > len(zeros) / 2 and not others.count(0):
            return f"UTF-16, not UTF-8. Convert it: iconv -f UTF-16{order} -t UTF-8 FILE > NEW"
    if b"\0" in head and not start.startswith((b"{", b"[", b"\xef\xbb\xbf")):
        return "not a text file, and of no kind that is known here. Give JSON, CSV or parquet"
    return None


def table_kind(path: str) -> str | None:
    """"parquet", "arrow file" or "arrow stream", or None for a file that is not a table of these. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(8)
    kinds = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
    return next((kind for first, kind in kinds.items() if head.startswith(first)), None)


def table_rows(path: str, kind: str) -> Iterator[dict]:
    """The rows of a table, a few at a time in memory. Raises Unreadable.

    A table has every key in every row, and null where a record had none: null is the same as absent.
    """
    import pyarrow  # takes a while to import

    try:
        for batch in _batches(path, kind):
            batch.validate(full=True)  # a damaged file would be read beyond its end
            for start in range(0, batch.num_rows, _ROWS):
                yield from _values(batch.slice(start, _ROWS).to_struct_array())
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        if getattr(error, "errno", None):
            raise
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
        raise Unreadable(f"a damaged {kind}, or one cut off: {reason}. Download or write it again") from error


def _batches(path, kind):
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=_ROWS)
    else:
        import pyarrow.ipc

        with pyarrow.memory_map(path) as file:
            if kind == "arrow stream":
                yield from pyarrow.ipc.open_stream(file)
            else:
                reader = pyarrow.ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))


def _values(array):
    """array.to_pylist() without the keys of structs that are null, column by column: several times as fast."""
    from pyarrow import types

    kind = array.type
    if types.is_struct(kind):
        names, there = [field.name for field in kind], array.is_valid().to_numpy(zero_copy_only=False).tolist()
        if len(set(names)) < len(names):
            raise Unreadable(f"two columns have the same name: {', '.join(names)}")
        rows = zip(*map(_values, array.flatten())) if names else itertools.repeat(())
        return [{name: value for name, value in zip(names, row) if value is not None} if is_there else None
                for is_there, row in zip(there, rows)]
    if types.is_list(kind) or types.is_large_list(kind):
        items, lengths = iter(_values(array.flatten())), array.value_lengths().fill_null(-1).to_numpy().tolist()
        return [None if length < 0 else list(itertools.islice(items, length)) for length in lengths]
    if types.is_string(kind) or types.is_large_string(kind):
        return array.to_numpy(zero_copy_only=False).tolist()
    return [_without_nulls(value) for value in array.to_pylist(maps_as_pydicts="strict")]


def _without_nulls(value):
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def delimiter_of(header: str) -> str | None:
    """What stands between the names of the columns in the first line of a CSV or TSV; None if that is none."""
    for delimiter in "\t,;":
        try:
            [names] = csv.reader([header], delimiter=delimiter, strict=True)
        except (csv.Error, ValueError):
            continue
        if len(names) > 1 and all(re.fullmatch(r"[\w][\w .\-/]{0,63}", name) for name in names):
            return delimiter
    return None


def csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it starts, cells) for each row, the header too. Raises Unreadable."""
    csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise: conversations are longer
    reader, line = csv.reader(lines, delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise Unreadable(f"not valid CSV in the row that starts on line {line}: {error}") from error
