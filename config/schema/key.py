"""What the schema says about one configuration key, beside its type and default.

`key()` makes the `msgspec.Meta` that is the last entry of a field's `Annotated[...]`. Its first argument is
the key's effect; giving a key an effect, once the code behind it exists, is changing that one word:

* ``now``      the value is used;
* ``warned``   accepted, but a value other than the default gets a line among the load warnings, because the user
               would otherwise believe to have something that is not there;
* ``ignored``  accepted silently: the value changes nothing that the user could notice with QEMU;
* ``refused``  a value other than the default is an error: running without what it asks for would be unsafe.

Whatever is not ``now`` has a reason, `why`, which the messages and the reference quote.
"""

from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct

Effect = Literal["now", "warned", "ignored", "refused"]

U32_MAX = 2**32 - 1
I64_MAX = 2**63 - 1

Count = Annotated[int, Meta(ge=0, le=U32_MAX)]
Positive = Annotated[int, Meta(ge=1, le=U32_MAX)]
Wide = Annotated[int, Meta(ge=0, le=I64_MAX)]
Byte = Annotated[int, Meta(ge=0, le=255)]
Percent = Annotated[int, Meta(ge=0, le=100)]
# -1 is "any port" in the vsock address family, so the last number is not usable.
VsockPort = Annotated[int, Meta(ge=1, le=U32_MAX - 1)]
Fraction = Annotated[float, Meta(ge=0)]
LogLevel = Literal["trace", "debug", "info", "warn", "error", "critical"]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and no key is read that the schema does not know."""


class KeyInfo(NamedTuple):
    """The documentation of one key, as `key()` recorded it."""

    effect: Effect
    description: str
    unit: str
    why: str
    hint: str


def key(
    effect: Effect,
    description: str,
    *,
    unit: str = "",
    why: str = "",
    hint: str = "",
    ge: float | None = None,
    le: float | None = None,
) -> Meta:
    """Describe one key.

    `description` is Markdown for the reference; `why` is the reason for an effect other than "now", without a full
    stop; `hint` says what to do about a wrong value, or instead of the key; `ge` and `le` are a number's inclusive
    bounds.
    """
    extra = {"effect": effect, "unit": unit, "why": why, "hint": hint}
    return Meta(description=description, ge=ge, le=le, extra=extra)


def annotation(section: type[Struct], name: str) -> Any:
    """The `Annotated[...]` of one field. Raises `KeyError` when the section has no such key."""
    return section.__annotations__[name]


def info(section: type[Struct], name: str) -> KeyInfo:
    """What the schema says about one key. Raises `KeyError` when the section has no such key."""
    meta = annotation(section, name).__metadata__[-1]
    return KeyInfo(description=meta.description, **meta.extra)
