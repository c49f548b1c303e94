"""Object stores on this machine: servers that speak S3's and Google Cloud Storage's protocols."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest

KINDS = {"s3": "moto", "gs": "gcp_storage_emulator"}
# The server, but for its way with uploads: it drops a last byte that is "\\r".
GOOGLE = """
import json, sys
from gcp_storage_emulator import server
from gcp_storage_emulator.__main__ import main

usual = server._read_data

def read(request, query):
    kind = request.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return usual(request, query)
    raw = server._decode_raw_data(server._read_raw_data(request), request)
    mark = b"--" + kind.partition("boundary=")[2].strip('"\\' ').encode()
    end = b"\\r\\n" if raw[len(mark) :].startswith(b"\\r\\n") else b"\\n"  # of the client's lines
    start, stop = raw.index(end + mark), raw.rindex(end + mark)
    meta = raw[:start].partition(end + end)[2]
    header, _, content = raw[start:stop].partition(end + end)
    kind = header.partition(b"Content-Type:")[2].strip().decode()
    return {"meta": json.loads(meta), "content": content, "content-type": kind}

server._read_data = read
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def bucket(kind):
    """(URL of an empty bucket, environment that reaches it); the environment is set within."""
    pytest.importorskip(KINDS[kind])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"http://127.0.0.1:{port}"
    if kind == "s3":
        line = ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        names = {"AWS_ENDPOINT_URL": where, "AWS_DEFAULT_REGION": "us-east-1"}
        names |= {"AWS_ACCESS_KEY_ID": "some", "AWS_SECRET_ACCESS_KEY": "one"}
    else:
        line = ["-c", GOOGLE, "start", f"--port={port}", "--in-memory"]
        line += ["--default-bucket=bucket"]
        names = {"STORAGE_EMULATOR_HOST": where, "GOOGLE_CLOUD_PROJECT": "project"}
        names |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # asks Google for credentials
        few = {"batch_size": 4}  # requests at once: the server drops others, for a second or more
        names |= {"FSSPEC_GS": json.dumps(few)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, *line], **quiet)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
                patch.delenv(name)
            for name, value in names.items():
                patch.setenv(name, value)
            _wait(port, server)
            import fsspec.config

            if kind == "gs":  # the environment was read before
                patch.setitem(fsspec.config.conf, "gs", few)
            else:
                import s3fs

                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield f"{kind}://bucket", names
    finally:
        server.kill()
        server.wait()


def _wait(port, server):
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert server.poll() is None
        time.sleep(0.1)
    raise TimeoutError("the server does not answer")
