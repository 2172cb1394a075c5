"""Initial data of guests: bounded at each step, checked, measured, and as a disk."""

import gzip
import hashlib
import time
from base64 import b64encode
from collections.abc import Callable

import pytest

from config.initdata import MOST_ENCODED_BYTES, MOST_TEXT_BYTES, parse
from tests.unit.config.config_site import Site

ANNOTATION = "io.katacontainers.config.hypervisor.cc_init_data"
TOML = b"""version = "0.1.0"
algorithm = "sha384"

[data]
"policy.rego" = '''
package agent_policy
default AllowRequestsFailingPolicy := input.a.b.c.d.e.f
'''
"""


def encoded(text: bytes, *, pack: Callable[[bytes], bytes] = gzip.compress) -> str:
    return b64encode(pack(text)).decode()


def test_the_text_is_measured_as_it_is() -> None:
    found = parse(encoded(TOML))
    assert (found.text, found.algorithm) == (TOML, "sha384")
    assert found.digest() == hashlib.sha384(TOML).digest()


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_algorithms(algorithm: str) -> None:
    text = TOML.replace(b"sha384", algorithm.encode())
    assert parse(encoded(text)).digest() == getattr(hashlib, algorithm)(text).digest()


def test_lines_of_base64_are_one_text() -> None:
    text = encoded(TOML)
    assert parse(f" {text[:40]}\n{text[40:]}\n").text == TOML


@pytest.mark.parametrize("padding", range(0, 600, 37))
def test_the_disk(padding: int) -> None:
    text = TOML + b"#" + hashlib.shake_256(bytes([padding % 256])).hexdigest(padding).encode()
    image = parse(encoded(text)).image()
    length = int.from_bytes(image[8:16], "little")
    assert len(image) % 512 == 0
    assert image[:8] == b"initdata"
    assert gzip.decompress(image[16 : 16 + length]) == text
    assert image[16 + length :] == bytes(len(image) - 16 - length)
    assert len(image) - 16 - length < 512
    assert image[16:20] == b"\x1f\x8b\x08\x08"  # a gzip that names its file
    assert image[26:40] == b"initdata.toml\0"
    assert parse(encoded(text)).image() == image


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the gzip in it ends too early"),
        ("%%%", "want base64 of gzip of TOML, got '%%%'"),
        ("eA", "want base64"),
        ("\u00e4" * 8, "want base64"),
        ("eHg=", "what the base64 says is not gzip"),
        (encoded(TOML, pack=lambda text: text), "what the base64 says is not gzip"),
        (encoded(TOML, pack=lambda text: gzip.compress(text)[:-9]), "ends too early"),
        (encoded(TOML, pack=lambda text: gzip.compress(text) + b"x"), "something follows it"),
        (encoded(TOML, pack=lambda text: gzip.compress(text) * 2), "something follows it"),
        (encoded(TOML, pack=lambda text: gzip.compress(text)[:-8] + bytes(8)), "not gzip"),
        (encoded(b"\xff"), "not valid: not UTF-8"),
        (encoded(b"version = "), "not valid: Invalid value"),
        (encoded(b""), "version: want '0.1.0', got nothing"),
        (encoded(TOML.replace(b"0.1.0", b"0.2.0")), "version: want '0.1.0', got '0.2.0'"),
        (encoded(TOML.replace(b'"0.1.0"', b"0.1")), "version: want '0.1.0', got 0.1"),
        (
            encoded(TOML.replace(b"sha384", b"md5")),
            "algorithm: want one of sha256, sha384, sha512, got 'md5'",
        ),
        (encoded(TOML.replace(b'"sha384"', b"['sha384']")), "algorithm: want one of sha256"),
        (encoded(TOML.split(b"[data]")[0]), "data: want a table of strings"),
        (encoded(TOML.split(b"[data]")[0] + b"data = 1"), "data: want a table of strings"),
        (encoded(TOML + b"x = 1\n"), "data: want a table of strings"),
        (encoded(TOML + b"x.y = 'z'\n"), "data: want a table of strings"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A" * (MOST_ENCODED_BYTES + 1), "more than 256 KiB of base64"),
        # 100 MiB of zeros are 100 KiB of gzip.
        (encoded(bytes(100 * 2**20)), "unpacks to more than 1024 KiB"),
        (encoded(b"#" * (MOST_TEXT_BYTES + 1)), "unpacks to more than 1024 KiB"),
        (encoded(b"x = " + b"[" * 500_000), "nested too deeply"),
        (encoded(b"a." * 100_000 + b"a = 1"), "a key has more than 32 parts"),
        (encoded(b"x = {" + b"'a' . " * 100_000 + b"a = 1}"), "a key has more than 32 parts"),
        (encoded(b"[" + b'"" .\t' * 100_000 + b"a]"), "a key has more than 32 parts"),
    ],
)
def test_bombs(text: str, said: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=said):
        parse(text)
    assert time.process_time() - began < 5


def test_just_within_the_limit() -> None:
    text = TOML + b"#" * (MOST_TEXT_BYTES - len(TOML))
    assert parse(encoded(text)).text == text


def test_a_pods_annotation_is_let_in_by_its_own_name(site: Site) -> None:
    text = encoded(TOML)
    allowed = 'enable_annotations = ["cc_init_data"]\n'
    assert site.annotated({ANNOTATION: text}, allowed).config.hypervisor.initdata == text


def test_a_pods_bomb_is_one_line(site: Site) -> None:
    problem = (
        f"annotation {ANNOTATION}: hypervisor.qemu.initdata: unpacks to more than 1024 KiB (make it with: "
    )
    with pytest.raises(Exception, match="unpacks") as caught:
        site.annotated({ANNOTATION: encoded(bytes(100 * 2**20))})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(problem)
