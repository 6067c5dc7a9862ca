# SPDX-License-Identifier: Apache-2.0
"""Rows of data from JSON lines, a JSON array, CSV or Parquet, compressed or not, with any byte
order mark; from folders of the datasets library, data in memory, and the hub.

The first bytes of a file determine its type; the name only distinguishes CSV from JSON.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..files.foreign import shown

Row = dict[str, Any]

_EXTRA = "pip install 'dualhead_ext[data]'"
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_NAMED = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
}
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_SUFFIXES = (".jsonl", ".json", ".gz", ".bz2", ".xz", ".csv", ".tsv", ".parquet")

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
# Suffix of a URL -> (reader of the datasets library, its options).
_READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
}


class Rows:
    """(number, row) of a source, in order. ``place`` says what the numbers count: "line" from 1, or
    "row" from 0.
    """

    def __init__(self, rows: Iterable[tuple[int, Row]], place: str) -> None:
        self._rows, self.place = rows, place

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return iter(self._rows)


def rows_of(
    function: str,
    source: str | os.PathLike,
    split: str | None,
    default_split: str,
    configuration: str | None = None,
) -> Rows:
    """The rows of a file, a URL, a folder of the datasets library (``save_to_disk``, or a clone of
    a hub dataset), or a hub dataset.

    Args:
        function: the name with which errors begin.
        split, configuration: of a folder or hub dataset; a file has no split.
    Raises:
        see :func:`dualhead_ext.data.load_preference_data`.
    """
    name = os.path.expanduser(os.fspath(source))
    if _URL.match(name):
        if split is not None:
            raise ValueError(f"{function}: split must be None for a file, got {split!r}")
        return _url_rows(function, name)
    path = Path(name)
    if path.is_dir():
        return _folder_rows(function, path, split, default_split, configuration)
    if path.exists() or name.endswith(_SUFFIXES):
        if split is not None:
            raise ValueError(f"{function}: split must be None for a file, got {split!r}")
        return read_file(path, function)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{function}: there is no file {name}")
    datasets = _library(function, f"{name!r} is not a file, and hub datasets need")
    chosen = () if configuration is None else (configuration,)
    return Rows(
        enumerate(datasets.load_dataset(name, *chosen, split=split or default_split)), "row"
    )


def stream_of(function: str, source: str | os.PathLike, split: str | None) -> Any:
    """A ``datasets.IterableDataset`` of a file, a URL, a folder or a dataset on the hub.

    Raises:
        as :func:`dualhead_ext.data.load_preference_data`; a broken row is found when it is read.
    """
    name = os.path.expanduser(os.fspath(source))
    datasets = _library(function, "a stream needs")
    with _saying_what_failed(function, name):
        return _open_stream(datasets, name, split)


@contextlib.contextmanager
def _saying_what_failed(function: str, name: str) -> Iterator[None]:
    """Errors of the datasets library as those of ``function``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{function}: there is no file {name} ({error})") from error
    except ImportError as error:
        raise ImportError(f"{function}: {name} needs another package ({error})") from error
    except Exception as error:  # its type depends on the file system
        raise ValueError(f"{function}: {name} cannot be read ({error})") from error


def _open_stream(datasets: Any, name: str, split: str | None) -> Any:
    if os.path.isdir(name) and {"dataset_info.json", "state.json"} <= set(os.listdir(name)):
        return datasets.load_from_disk(name).to_iterable_dataset()
    is_file = _URL.match(name) or os.path.isfile(name) or name.endswith(_SUFFIXES)
    if not is_file:
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    if split is not None:
        raise ValueError(f"split must be None for a file, got {split!r}")
    reader, options = _reader(name)
    if name.endswith((".gz", ".bz2", ".xz")) and not re.match(r"(https?|hf)://|[^:]*$", name):
        raise ValueError(
            "the datasets library streams compressed files of https:// and hf:// alone: unpack it, "
            "or load it without streaming"
        )
    return datasets.load_dataset(reader, data_files=name, split="train", streaming=True, **options)


def _reader(name: str) -> tuple[str, dict[str, Any]]:
    """How the datasets library reads a file of this name, or a URL."""
    path = Path(name.partition("?")[0])
    path = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz") else path
    if path.suffix not in _READERS:
        raise ValueError(
            f"{name} must name a file that ends in {', '.join(_READERS)} (or .gz, .bz2, .xz after "
            f"it), got {path.suffix or 'no ending'!r}"
        )
    return _READERS[path.suffix]


def rows_in(data: Any) -> Rows | None:
    """The rows of data in memory: a sequence of dicts, a datasets.Dataset or a pandas DataFrame;
    None for anything else.
    """
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):
        records = data.astype(object).where(data.notna(), None).to_dict("records")
        rows = ({name: _plain(value) for name, value in row.items()} for row in records)
        return Rows(enumerate(rows), "row")
    if isinstance(data, (str, bytes, dict)) or not hasattr(data, "__getitem__"):
        return None
    if not hasattr(data, "__len__"):
        return None
    return Rows(((i, data[i]) for i in range(len(data))), "row")


def _plain(value: Any) -> Any:
    """The value of a cell, with arrays (also nested ones) as lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _library(function: str, why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{function}: {why} the datasets package: {_EXTRA}") from error
    return datasets


def _folder_rows(
    function: str, path: Path, split: str | None, default_split: str, configuration: str | None
) -> Rows:
    datasets = _library(function, f"{path} is a folder, which needs")
    names = {entry.name for entry in path.iterdir()}
    try:
        if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
            data = datasets.load_from_disk(str(path))
        else:
            chosen = () if configuration is None else (configuration,)
            data = datasets.load_dataset(str(path), *chosen)
    except Exception as error:  # its type depends on the files inside
        raise ValueError(f"{function}: {path} cannot be read as a dataset ({error})") from error
    if isinstance(data, dict):
        alone = next(iter(data)) if len(data) == 1 else default_split
        wanted = split or (default_split if default_split in data else alone)
        if wanted not in data:
            raise ValueError(
                f"{function}: split must be one of {shown(data)} for {path}, got {wanted!r}"
            )
        data = data[wanted]
    elif split is not None:
        raise ValueError(f"{function}: split must be None for {path}, one dataset, got {split!r}")
    return Rows(enumerate(data), "row")


def _url_rows(function: str, url: str) -> Rows:
    """The rows of the file at a URL, which is fetched whole."""
    with tempfile.TemporaryDirectory(prefix="dualhead-") as folder:
        path = Path(folder, Path(urlsplit(url).path).name or "file")
        with _saying_what_failed(function, url):
            import fsspec

            with fsspec.open(url, "rb") as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        try:
            rows = read_file(path, function)
            return Rows(list(rows), rows.place)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), url)) from error


# --- files ----------------------------------------------------------------------------------------


def read_jsonl(path: str | os.PathLike) -> Rows:
    """The rows of a file, see :func:`read_file`."""
    return read_file(path, "read_jsonl")


def read_file(path: str | os.PathLike, function: str = "read_file") -> Rows:
    """The rows of a file: JSON lines (empty lines are skipped), a JSON array, CSV with a header, or
    Parquet.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: a line is not a JSON object, or the file is truncated; the message names the
            line.
        ImportError: Parquet without pyarrow.
    """
    path = Path(path).expanduser()
    opener, start = _opener(path, function)
    if start[:4] == b"PAR1":
        return _parquet_rows(function, path)
    encoding = _encoding(start)
    stem = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz") else path
    if stem.suffix in (".csv", ".tsv"):
        return Rows(_csv_rows(path, opener, encoding), "line")
    if start.decode(encoding, errors="ignore").lstrip().startswith("["):
        return _array_rows(path, opener, encoding)
    return Rows(_json_lines(path, opener, encoding), "line")


def read_lines(path: str | os.PathLike, function: str = "read_lines") -> list[str]:
    """The lines of a text file in UTF-8 or UTF-16, which may be compressed, without their ends.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: not text, or the file is truncated.
    """
    path = Path(path).expanduser()
    opener, start = _opener(path, function)
    try:
        with opener(path, "rt", encoding=_encoding(start)) as file:
            return [line.rstrip("\n") for line in file]
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_text(error)}") from error


def _opener(path: Path, function: str) -> tuple[Any, bytes]:
    """(function that opens the file, its first uncompressed bytes), regardless of its name.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: an archive, or a placeholder for a file.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{function}: {path} is a folder; expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"{function}: there is no file {path}")
    opener, start = _first_bytes(path)
    for magic, what in _NAMED.items():
        if start.startswith(magic):
            raise ValueError(f"{function}: {path} is {what}")
    return opener, start


def _first_bytes(path: Path) -> tuple[Any, bytes]:
    with open(path, "rb") as file:
        start = file.read(256)
    opener: Any
    for magic, opener in _OPENERS.items():
        if start.startswith(magic):
            try:
                with opener(path, "rb") as file:
                    return opener, file.read(256)
            except (OSError, EOFError, lzma.LZMAError):
                return opener, b""  # broken: reading it will name the line
    return open, start


def _encoding(start: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    if start[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if start[:1] == b"\0" else "utf-8"


def _json_lines(path: Path, opener: Any, encoding: str) -> Iterator[tuple[int, Row]]:
    number = 0
    with opener(path, "rt", encoding=encoding) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f"{path}, after line {number}: cannot be read ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {number}: {_not_text(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    return row


def _not_text(error: UnicodeDecodeError) -> str:
    return f"not {error.encoding.upper().removesuffix('-SIG')} ({error})"


def _array_rows(path: Path, opener: Any, encoding: str) -> Rows:
    try:
        with opener(path, "rt", encoding=encoding) as file:
            rows = json.load(file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_text(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected an object, got {type(row).__name__}")
    return Rows(enumerate(rows), "row")


def _parquet_rows(function: str, path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            f"{function}: {path} is Parquet, which needs the pyarrow package: {_EXTRA}"
        ) from error
    try:
        return Rows(enumerate(parquet.read_table(path).to_pylist()), "row")
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


# --- CSV ------------------------------------------------------------------------------------------


def _csv_rows(path: Path, opener: Any, encoding: str) -> Iterator[tuple[int, Row]]:
    line = 1
    try:
        with opener(path, "rt", encoding=encoding, newline="") as file:
            text = io.StringIO(file.read(), newline="")
        header = text.readline()
        text.seek(0)
        delimiter = max(",;\t", key=header.count)
        limit = csv.field_size_limit(2**31 - 1)  # a dialogue may be longer than the default
        try:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            rows = []
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(reader.fieldnames or ())} cells")
                rows.append((line, {name: _cell(value) for name, value in row.items()}))
        finally:
            csv.field_size_limit(limit)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_text(error)}") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    yield from rows


def _cell(text: str) -> Any:
    """The value of a CSV cell. Empty means null; a list (messages, scores) may be written as JSON
    or as Python prints it; other text stays as it is.
    """
    if not text.strip():
        return None
    if text.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list):
                return value
    return text
