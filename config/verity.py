"""dm-verity parameters as text: `root_hash=...,salt=...,data_blocks=...,data_block_size=...,hash_block_size=...`."""

import re

KEYS = ("root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size")

_BLOCK_SIZES = frozenset({"512", "1024", "2048", "4096"})
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SALT = re.compile(r"(?:[0-9a-fA-F]{2}){1,256}|-")
_COUNT = re.compile(r"[1-9][0-9]{0,17}")


def parse(text: str) -> dict[str, str]:
    """The values by their names, in any order. Raises ValueError, naming the part that is wrong."""
    words = dict(word.strip().partition("=")[::2] for word in text.split(","))
    if problem := _problem(words):
        raise ValueError(f"{problem}; want {'=...,'.join(KEYS)}=...")
    return words


def problem_of(text: str) -> str:
    """What is wrong with a text; nothing with an empty one, which means no hashes."""
    try:
        if text:
            parse(text)
    except ValueError as err:
        return str(err)
    return ""


def _problem(words: dict[str, str]) -> str | None:
    if unknown := words.keys() - set(KEYS):
        return f"{min(unknown)!r} is not known"
    if missing := [key for key in KEYS if key not in words]:
        return f"{missing[0]} is missing"
    if not _SHA256.fullmatch(words["root_hash"]):
        return "root_hash is not the 64 hexadecimal digits of a SHA-256"
    if not _SALT.fullmatch(words["salt"]):
        return "salt is not made of pairs of hexadecimal digits, nor -"
    if not _COUNT.fullmatch(words["data_blocks"]):
        return "data_blocks is not a positive number"
    for key in ("data_block_size", "hash_block_size"):
        if words[key] not in _BLOCK_SIZES:
            return f"{key} is none of {', '.join(sorted(_BLOCK_SIZES, key=int))}"
    return None
