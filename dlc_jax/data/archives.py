"""Tar and zip archives, read in place: names in an archive only name images, nothing is extracted.

An archive is indexed once, the index kept in the cache with the archive's size and time of change.
Left out, and counted by reason: absolute names, names with "..", links, devices and other special
members, hidden files, folders of a server's thumbnails, what is encrypted or of an unknown zip
method, and files without the ending of an image. Of members with the same name the last counts, as
when unpacking. A tar inside a tar, as ImageNet's, is a folder. Classes that lie in a tar beside the
images, as WebDataset has them, are in its index. The folders that all images share are dropped from
the names.
"""

import json
import os
import tarfile
import zipfile

from dlc_jax.data import listing, naming, shard, webdataset
from dlc_jax.data.archive_reader import (
    COMPRESSED,
    DEFLATED,
    STORED,
    TarReader,
    ZipReader,
    open_with,
    opener_of,
)
from dlc_jax.data.listing import Listing
from dlc_jax.errors import UserError

FORMAT = 2  # of the index


def kind_of(path):
    """ "tar", "zip", or None, by the file's name."""
    name = str(path).lower()
    if name.endswith((".tar", *COMPRESSED)):
        return "tar"
    return "zip" if name.endswith(".zip") else None


def open_archive(path, *, cache, limit, max_bytes):
    """The `Listing` of an archive; `sequential` if it is a compressed tar.

    Where images of a tar have labels beside them, the label of one that has none is -1; see
    `webdataset.labeled`.

    Args:
      path: a `.tar`, `.zip`, `.tar.xz`, `.tar.gz`, `.tar.bz2` or a short form of these.
      cache: folder for the index, not kept if it cannot be written.
      limit: the most bytes that a compressed tar may decompress to.
      max_bytes: of one image; longer ones are left out.

    Raises:
      UserError: if it cannot be read, is cut off or damaged, or decompresses to too much.
    """
    with listing.reading(path):
        stat = os.stat(path)
        about = {
            "format": FORMAT,
            "heic": naming.reads_heic(),
            "bytes": stat.st_size,
            "changed": stat.st_mtime_ns,
        }
        kept = cache / f"{path.name}-{listing.digest([str(path.absolute())])[:12]}.json"
        index = _kept(kept, about)
        if index is None:
            if kind_of(path) == "zip":
                index = about | _index_zip(path, max_bytes)
            else:
                index = about | _index_tar(path, limit, max_bytes)
            _keep(kept, index)
    names, sizes = index["names"], index["sizes"]
    content = listing.content_of(names, sizes)
    about = dict(content=content, skipped=index["skipped"], size=sum(sizes))
    if kind_of(path) == "zip":
        return Listing("zip", names, ZipReader(path, index), **about)
    opener = opener_of(path)
    if any(label is not None for label in index["labels"]):
        about["labels"], about["classes"] = naming.number_classes(index["labels"])
    return Listing(
        "tar", names, TarReader(path, index, opener), sequential=opener is not None, **about
    )


def _kept(path, about):
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    fits = isinstance(found, dict) and about.items() <= found.items()
    return found if fits else None


def _keep(path, index):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shard.write_json(path, index, indent=None)
    except OSError:
        pass  # it only saves time


class _Index:
    """Collects members: name -> where it is, in the order of the archive."""

    def __init__(self, max_bytes):
        self.members, self.skipped, self.max_bytes = {}, naming.Skipped(), max_bytes
        self.labels, self._systems = webdataset.Labels(), set()

    def skip(self, name, reason):
        if reason == naming.SYSTEM_FOLDER:  # a folder counts once
            folder = naming.system_folder(name)
            if folder in self._systems:
                return
            self._systems.add(folder)
        self.skipped.add(reason)

    def add(self, name, *where, size, reason=None):
        name, wrong = naming.check_name(name)
        if size > self.max_bytes:
            reason = reason or f"more than {self.max_bytes} bytes"
        if wrong := wrong or reason:
            return self.skip(name, wrong)
        if self.members.pop(name, None):
            self.skip(name, "same name as a later one")
        self.members[name] = (size, *where)

    def finish(self, *columns):
        """{"names", "sizes", column: [...], "labels": [text or None], "skipped"}."""
        shared = len(naming.common_folder(list(self.members)))
        columns = ("sizes", *columns)
        values = [list(column) for column in zip(*self.members.values())] or [[] for _ in columns]
        names = [name[shared:] for name in self.members]
        labels = [self.labels.of(name) for name in self.members]
        return {
            "names": names,
            "labels": labels,
            "skipped": self.skipped.counts(),
            **dict(zip(columns, values)),
        }


def _index_tar(path, limit, max_bytes):
    index, opener = _Index(max_bytes), opener_of(path)
    with open_with(path, opener) as file:

        def walk(file, prefix, start, outer):
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # tarfile keeps them all
                    offset = start + member.offset_data
                    if opener and offset + member.size > limit:
                        raise UserError(
                            f"{path} decompresses to more than {limit / 1e9:g} GB; raise cache_gb, "
                            "or unpack it yourself"
                        )
                    if member.isdir():
                        continue
                    name, wrong = naming.check_name(member.name)
                    plain = member.isreg() and not member.issparse()
                    if outer and plain and name.lower().endswith(".tar"):
                        if naming.check_name(name[:-4] + ".png")[1]:
                            index.skip(name, wrong)
                            continue
                        walk(tar.extractfile(member), f"{prefix}{name[:-4]}/", offset, False)
                        continue
                    if wrong == naming.NOT_AN_IMAGE and webdataset.may_be_label(name, member):
                        if index.labels.add(prefix + name, tar.extractfile(member).read()):
                            continue
                    if not plain:
                        link = member.issym() or member.islnk()
                        wrong = wrong or ("link" if link else "special member")
                    index.add(prefix + name, offset, size=member.size, reason=wrong)
                _check_end(file, tar.offset)

        walk(file, "", 0, True)
    return index.finish("offsets")


def _check_end(file, offset):
    """tarfile takes a damaged header for the end."""
    file.seek(offset)
    block = file.read(512)
    if block.strip(b"\0") or (block and len(block) < 512):
        raise EOFError(f"damaged at byte {offset}")


def _index_zip(path, max_bytes):
    index = _Index(max_bytes)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            reason = None
            if member.flag_bits & 1:
                reason = "encrypted"
            elif member.compress_type not in (STORED, DEFLATED):
                reason = "unknown zip method"
            elif (member.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                link = (member.external_attr >> 16) & 0o170000 == 0o120000
                reason = "link" if link else "special member"
            where = (member.header_offset, member.compress_size, member.compress_type, member.CRC)
            index.add(
                member.filename.replace("\\", "/"), *where, size=member.file_size, reason=reason
            )
    return index.finish("offsets", "lengths", "methods", "checksums")
