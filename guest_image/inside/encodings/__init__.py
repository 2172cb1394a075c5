# mypy: ignore-errors
"""The encodings of the guest: UTF-8, ASCII and Latin-1."""

import _codecs
import codecs
import sys

_CODERS = {
    "utf_8": (_codecs.utf_8_encode, _codecs.utf_8_decode),
    "ascii": (_codecs.ascii_encode, _codecs.ascii_decode),
    "latin_1": (_codecs.latin_1_encode, _codecs.latin_1_decode),
}
_ALIASES = {
    "utf8": "utf_8",
    "us_ascii": "ascii",
    "latin1": "latin_1",
    "iso8859_1": "latin_1",
    "iso_8859_1": "latin_1",
}


def _info(name, encode, decode):
    class IncrementalEncoder(codecs.IncrementalEncoder):
        def encode(self, text, final=False):
            return encode(text, self.errors)[0]

    class IncrementalDecoder(codecs.BufferedIncrementalDecoder):
        def _buffer_decode(self, data, errors, final):
            return decode(data, errors, final) if name == "utf_8" else decode(data, errors)

    def whole_decode(data, errors="strict"):
        return decode(data, errors, True) if name == "utf_8" else decode(data, errors)

    return codecs.CodecInfo(
        encode, whole_decode, None, None, IncrementalEncoder, IncrementalDecoder, name.replace("_", "-")
    )


def search_function(encoding):
    name = encoding.lower().replace("-", "_").replace(" ", "_")
    name = _ALIASES.get(name, name)
    coders = _CODERS.get(name)
    return None if coders is None else _info(name, *coders)


codecs.register(search_function)
# The interpreter imports this by name while it starts.
sys.modules.setdefault("encodings.utf_8", sys.modules[__name__])
