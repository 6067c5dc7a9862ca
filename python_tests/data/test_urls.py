# SPDX-License-Identifier: Apache-2.0
"""Files of URLs: https:// from a plain server, s3:// from one that answers what s3fs asks, and any
other file system of fsspec."""

import functools
import gzip
import http.server
import json
import re
import threading
import urllib.parse
from typing import ClassVar

import pytest

from dualhead_ext.data import load_preference_data
from dualhead_ext.data.files import stream_of

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("aiohttp", reason="the extra data is not installed")
pytest.importorskip("datasets", reason="the extra data is not installed")

ROWS = [{"prompt": f"Grüezi {i}?", "chosen": f"Ja, {i}.", "rejected": "Nein."} for i in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the address at which a local server provides its files."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_files_of_urls(served):
    import fsspec
    import pyarrow
    from pyarrow import parquet

    folder, address = served
    (folder / "rows.jsonl").write_bytes(LINES)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    tabs = ["\t".join(ROWS[0]), "\t".join(ROWS[0].values())]
    (folder / "rows.tsv").write_text("\n".join(tabs) + "\n", encoding="utf-8")
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        found = load_preference_data(f"{address}/{name}?download=true")
        assert list(found) == ROWS, name
    assert list(load_preference_data(f"{address}/rows.tsv")) == ROWS[:1]
    # Any file system of fsspec works. This one needs no server, unlike s3:// and gs://.
    fsspec.filesystem("memory").pipe("/bucket/rows.jsonl", LINES)
    assert list(load_preference_data("memory://bucket/rows.jsonl")) == ROWS


def test_urls_that_cannot_be_read(served, tmp_path):
    folder, address = served
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    for url, error, problem in (
        (f"{address}/missing.jsonl", FileNotFoundError, "there is no file http"),
        (f"{address}/broken.parquet", ValueError, r"http.*broken\.parquet: cannot be read as Parq"),
        ("nosuch://bucket/rows.jsonl", ValueError, "cannot be read .*nosuch"),
    ):
        with pytest.raises(error, match=problem):
            load_preference_data(url)
    with pytest.raises(ValueError, match="split must be None for a file"):
        load_preference_data("s3://bucket/rows.jsonl", "test")


# --- s3:// ----------------------------------------------------------------------------------------


class Store(http.server.BaseHTTPRequestHandler):
    """HeadObject, GetObject with a range, and ListObjectsV2 of one bucket. Signatures are taken as
    they come."""

    objects: ClassVar = {
        "/bucket/rows.jsonl": LINES,
        "/bucket/sub/rows.jsonl.gz": gzip.compress(LINES),
    }

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"1"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        place = urllib.parse.urlparse(self.path)
        body = self.objects.get(urllib.parse.unquote(place.path))
        if "list-type" in place.query:
            prefix = urllib.parse.parse_qs(place.query).get("prefix", [""])[0]
            keys = [k.removeprefix("/bucket/") for k in self.objects]
            found = "".join(
                f"<Contents><Key>{key}</Key><Size>1</Size></Contents>"
                for key in keys
                if key.startswith(prefix)
            )
            listed = f"<ListBucketResult><Name>bucket</Name>{found}</ListBucketResult>"
            self._answer(200, listed.encode(), Content_Type="application/xml")
        elif body is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            low, high = int(part[1]), int(part[2] or len(body) - 1)
            piece = body[low : high + 1]
            span = f"bytes {low}-{low + len(piece) - 1}/{len(body)}"
            self._answer(206, piece, Content_Range=span)
        else:
            self._answer(200, body, Last_Modified="Mon, 02 Nov 2026 10:00:00 GMT")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()


def test_files_of_a_bucket(bucket):
    for name in ("rows.jsonl", "sub/rows.jsonl.gz"):
        assert list(load_preference_data(f"{bucket}/{name}")) == ROWS, name


def test_rows_as_they_arrive(bucket):
    rows = list(stream_of("stream", f"{bucket}/rows.jsonl", None))
    assert rows == ROWS
    with pytest.raises(ValueError, match=r"sub/rows\.jsonl\.gz cannot be read .*unpack it"):
        stream_of("stream", f"{bucket}/sub/rows.jsonl.gz", None)


def test_a_file_that_is_not_there(bucket):
    with pytest.raises(FileNotFoundError, match=r"there is no file s3://bucket/missing\.jsonl"):
        load_preference_data(f"{bucket}/missing.jsonl")
