"""SHA-256 of files: the one place where bytes are hashed whole.

When. A size is compared at every start. A whole hash is taken where a copy was made (a shard or a
checkpoint was just written) and where somebody asks for it (`verify`), and never while another
process waits in a collective: several processes hash a share of the files each.
"""

import concurrent.futures
import hashlib
from collections.abc import Iterable
from pathlib import Path

THREADS = 4


def of_file(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: SHA-256} of files of a directory, read by a few threads."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: of_file(directory / name), names)
        return dict(zip(names, found, strict=True))


def of_text(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
