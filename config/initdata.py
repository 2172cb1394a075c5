"""Initial data of a guest: what a pod may hand to it before anything runs, checked, measured and as a disk.

They come as Kata has them: base64 of gzip of TOML with `version`, `algorithm` and a table `data` of texts. Anybody who
may annotate a pod writes them, so each step has a limit before it is taken: the text's length, what it unpacks to, and
how deep its keys are, on which Python's reader of TOML would spend minutes.
"""

import base64
import gzip
import hashlib
import io
import re
import tomllib
import zlib
from typing import NamedTuple

from config.describe import show

VERSION = "0.1.0"
ALGORITHMS = ("sha256", "sha384", "sha512")
# All annotations of a pod together have no more in Kubernetes.
MOST_ENCODED_BYTES = 256 * 1024
MOST_TEXT_BYTES = 1024 * 1024

_GZIP = 16 + zlib.MAX_WBITS
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')[ \t]*"""
_DEEP_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_KEY_PART}\.[ \t]*){{32}}")
# The disk: a word to know it by, the length of what follows, the same gzip of TOML, whole sectors.
_MAGIC = b"initdata"
_FILE_NAME = "initdata.toml"
_SECTOR_BYTES = 512


class InitData(NamedTuple):
    """Initial data that passed all checks; `text` is the TOML, byte by byte as it was written."""

    text: bytes
    algorithm: str

    def digest(self) -> bytes:
        """What the guest's report proves, in the length of the algorithm."""
        return hashlib.new(self.algorithm, self.text).digest()

    def image(self) -> bytes:
        """The content of the disk by which they reach the guest."""
        packed = io.BytesIO()
        with gzip.GzipFile(filename=_FILE_NAME, mode="wb", fileobj=packed, mtime=0) as file:
            file.write(self.text)
        content = _MAGIC + len(packed.getvalue()).to_bytes(8, "little") + packed.getvalue()
        return content + bytes(-len(content) % _SECTOR_BYTES)


def parse(encoded: str) -> InitData:
    """Read and check them. Raises ValueError with the problem, which is one line."""
    text = _unpacked(_decoded(encoded))
    table = _table(text)
    if table.get("version") != VERSION:
        raise ValueError(f"version: want {VERSION!r}, got {show(table.get('version'))}")
    algorithm = table.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: want one of {', '.join(ALGORITHMS)}, got {show(algorithm)}")
    data = table.get("data")
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ValueError("data: want a table of strings")
    return InitData(text, str(algorithm))


def _decoded(encoded: str) -> bytes:
    if len(encoded) > MOST_ENCODED_BYTES:
        raise ValueError(f"more than {MOST_ENCODED_BYTES // 1024} KiB of base64")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise ValueError(f"want base64 of gzip of TOML, got {show(encoded)}") from None


def _unpacked(packed: bytes) -> bytes:
    reader = zlib.decompressobj(_GZIP)
    try:
        text = reader.decompress(packed, MOST_TEXT_BYTES + 1)
    except zlib.error:
        raise ValueError("want base64 of gzip of TOML: what the base64 says is not gzip") from None
    if len(text) > MOST_TEXT_BYTES:
        raise ValueError(f"unpacks to more than {MOST_TEXT_BYTES // 1024} KiB")
    if not reader.eof or reader.unused_data:
        raise ValueError("the gzip in it ends too early, or something follows it")
    return text


def _table(text: bytes) -> dict[str, object]:
    try:
        toml = text.decode()
        if _DEEP_KEY.search(toml):
            raise ValueError("a key has more than 32 parts")
        return tomllib.loads(toml)
    except RecursionError:
        raise ValueError("the TOML in it is nested too deeply") from None
    except ValueError as err:
        problem = "not UTF-8" if isinstance(err, UnicodeDecodeError) else err
        raise ValueError(f"the TOML in it is not valid: {problem}") from None
