"""One file from the web, whole and checked: pooch names and verifies it, and what was received is never lost.

pooch's own downloaders begin again after an interruption; the one here keeps the bytes beside the file and asks for
the rest (HTTP Range).
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from chexlib.errors import DataError

CHUNK = 1 << 16  # bytes: what is lost at most when a connection ends
ATTEMPTS = 5  # in a row that bring no byte
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """A file to be had: its size in bytes, and its checksum as pooch writes them (`md5:...`, `sha256:...`)."""

    name: str
    url: str
    size: int
    checksum: str


def retrieve(remote: Remote, folder: Path, *, timeout: float = 60.0, pause: float = 2.0) -> Path:
    """Download a file into `folder`, or go on with it, and check it; one that is there and right is left.

    Raises
    ------
    DataError
        The server refuses, or brings nothing for `ATTEMPTS` attempts, or the content is not what it should be.
    """
    import pooch

    partial = partial_of(remote, folder)

    def download(url, output_file, _):
        _complete(remote, partial, timeout, pause)
        os.unlink(output_file)
        try:
            os.link(partial, output_file)  # kept until it is checked: a kill meanwhile costs nothing
        except OSError:  # no hard links here
            os.replace(partial, output_file)

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        pooch.retrieve(remote.url, remote.checksum, fname=remote.name, path=folder, downloader=download)
    except ValueError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{remote.name} from {remote.url} is not what was expected ({remote.checksum}): damaged on the way, or "
            "changed there. It was removed. Try again; then look at the page of the release."
        ) from error
    except OSError as error:
        raise DataError(
            f"{remote.name} cannot be written in {folder}: {error.strerror or error}. What came is kept: make room and "
            "run it again."
        ) from error
    partial.unlink(missing_ok=True)
    return folder / remote.name


def _complete(remote: Remote, partial: Path, timeout: float, pause: float) -> None:
    """Download until `partial` has the size of `remote`."""
    import requests

    have, idle = size_of(partial), 0
    if have > remote.size:
        partial.unlink()
        have = 0
    with tqdm(desc=remote.name, total=remote.size, initial=have, unit="B", unit_scale=True, disable=None) as bar:
        while have < remote.size:
            try:
                _receive(remote, partial, have, timeout, bar)
                fault = None
            except requests.RequestException as error:
                fault = error
            before, have = have, size_of(partial)
            if have > before:
                idle = 0
            elif (idle := idle + 1) == ATTEMPTS:
                raise DataError(
                    f"{remote.url} brought nothing in {ATTEMPTS} attempts, last: {fault}. {have:,} of "
                    f"{remote.size:,} bytes of {remote.name} are kept; run it again to go on from there."
                ) from fault
            if have < remote.size:
                _log.warning("%s: interrupted at %d bytes (%s), going on", remote.name, have, fault)
                time.sleep(min(pause * 2**idle, 60.0) if idle else 0.0)


def partial_of(remote: Remote, folder: Path) -> Path:
    """Where the bytes that came are kept until all are there."""
    return folder / f"{remote.name}.partial"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _receive(remote: Remote, partial: Path, have: int, timeout: float, bar) -> None:
    """Append what one answer of the server brings."""
    import requests

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(remote.url, headers=headers, stream=True, timeout=timeout) as answer:
        code = answer.status_code
        if 400 <= code < 500 and code not in (408, 429):
            raise DataError(f"{remote.url} answers {code} {answer.reason}: {remote.name} cannot be had there now.")
        answer.raise_for_status()
        length, span = answer.headers.get("Content-Length", ""), answer.headers.get("Content-Range", "")
        if code == 206 and not span.startswith(f"bytes {have}-"):
            raise requests.ConnectionError(f"asked for bytes {have}-, got {span!r}")
        total = span.rpartition("/")[2] if code == 206 else length
        if total.isdigit() and int(total) != remote.size:
            raise DataError(
                f"{remote.url} offers {total} bytes, and {remote.name} has {remote.size}: it is another file."
            )
        with open(partial, "ab") as file:
            if code != 206:  # the server begins again, whatever was asked
                file.truncate(0)
                bar.reset()
            for chunk in answer.iter_content(CHUNK):
                if file.tell() + len(chunk) > remote.size:
                    file.truncate(0)
                    raise DataError(f"{remote.url} does not end after the {remote.size} bytes of {remote.name}.")
                bar.update(file.write(chunk))
