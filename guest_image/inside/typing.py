# mypy: ignore-errors
"""Names for annotations, which nobody evaluates in the guest, and a light NamedTuple."""

from _collections import _tuplegetter

TYPE_CHECKING = False


class _Form:
    """Anything that may stand in an annotation or a base class list."""

    def __getitem__(self, parameters):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__

    def __call__(self, *args, **kwargs):
        return self

    def __mro_entries__(self, bases):
        return ()


Any = Awaitable = Callable = ClassVar = Final = Iterable = Literal = NoReturn = Optional = Self = Type = (
    Union
) = _Form()
Generic = Protocol = _Form()


def TypeVar(name, *constraints, **options):
    return _Form()


ParamSpec = TypeVar


def final(decorated):
    return decorated


overload = runtime_checkable = final


def cast(kind, value):
    return value


class _NamedTupleMeta(type):
    def __new__(mcls, name, bases, namespace):
        fields = tuple(namespace.get("__annotations__", ()))
        defaults = {field: namespace.pop(field) for field in fields if field in namespace}
        count = len(fields)

        def __new__(cls, *args, **kwargs):
            if len(args) != count or kwargs:
                values = {**defaults, **kwargs, **dict(zip(fields, args, strict=False))}
                if len(values) != count or len(args) > count:
                    raise TypeError(
                        f"{name} takes {', '.join(fields)}; got {len(args)} values and {sorted(kwargs)}"
                    )
                args = [values[field] for field in fields]
            return tuple.__new__(cls, args)

        def __repr__(self):
            return f"{name}({', '.join(f'{f}={v!r}' for f, v in zip(fields, self, strict=True))})"

        def _replace(self, **changes):
            return type(self)(**{**dict(zip(fields, self, strict=True)), **changes})

        members = {
            "__slots__": (), "_fields": fields, "__new__": __new__, "__repr__": __repr__, "_replace": _replace,
            **{field: _tuplegetter(index, None) for index, field in enumerate(fields)},
        }  # fmt: skip
        return type(name, (tuple,), {**members, **namespace})


class _NamedTuple:
    def __mro_entries__(self, bases):
        return (_NamedTupleBase,)


_NamedTupleBase = type.__new__(_NamedTupleMeta, "NamedTuple", (), {})
NamedTuple = _NamedTuple()
