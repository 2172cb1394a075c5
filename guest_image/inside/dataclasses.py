# mypy: ignore-errors
"""Classes of named values, given by keyword. The standard library's write and compile methods for each class."""


def dataclass(*, frozen=False, kw_only=False):
    def made(cls):
        names = tuple(cls.__annotations__)
        defaults = {name: cls.__dict__[name] for name in names if name in cls.__dict__}
        wanted = frozenset(names)

        def __init__(self, **values):
            values = {**defaults, **values}
            if values.keys() != wanted:
                raise TypeError(f"{cls.__name__} takes {', '.join(names)}; got {', '.join(values)}")
            self.__dict__.update(values)

        cls.__init__ = __init__
        cls.__repr__ = _repr
        if frozen:
            cls.__setattr__ = cls.__delattr__ = _refuse
        return cls

    return made


def replace(value, /, **changes):
    return type(value)(**{**value.__dict__, **changes})


def _repr(self):
    words = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__annotations__)
    return f"{type(self).__name__}({words})"


def _refuse(self, name, *value):
    raise AttributeError(f"cannot change {name!r}")
