"""Folders of object stores: a run works on a local copy, and what it keeps goes to the store.

    local(text)     the folder of a path, or the local copy of a URL such as gs://bucket/run
    send(path)      what is new or changed below a path goes to the store
    fetch(path)     what is new or changed in the store comes here
    remove(path)    what was deleted or moved here is deleted there

For an ordinary folder all of these do nothing, so nobody who writes asks where a folder is. Several
processes have a copy each, and meet through the store. The rule of order: a file that vouches for
others (a seal, a manifest, `done.json`) is sent after them and removed before them. An object is
written whole or not at all, so a store that a killed run left is one that this code can read. There
is no renaming and no appending; what a store has no atomic form of is not needed.

The store is reached through fsspec: gs:// needs the package gcsfs, s3:// needs s3fs, and each finds
credentials its own way. What was downloaded lies in `DLC_SCRATCH`, or the system's temporary
folder, until the process ends.
"""

from dlc_jax.remote.copies import (
    begin,
    begun,
    end,
    fetch,
    hold,
    holder,
    is_copy,
    local,
    remove,
    send,
    shown,
    size,
    url_of,
)
from dlc_jax.remote.store import Store, StoreError, Unreachable, is_url

__all__ = [
    "Store",
    "StoreError",
    "Unreachable",
    "begin",
    "begun",
    "end",
    "fetch",
    "hold",
    "holder",
    "is_copy",
    "is_url",
    "local",
    "remove",
    "send",
    "shown",
    "size",
    "url_of",
]
