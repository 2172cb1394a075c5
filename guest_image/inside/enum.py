# mypy: ignore-errors
"""Enumerations: members by name and value, iteration, `_missing_`. No flags, no aliases, no functional form."""


class auto:
    pass


class EnumMeta(type):
    def __new__(mcls, name, bases, namespace):
        members = {}
        for key in list(namespace):
            value = namespace[key]
            if key[0] != "_" and not callable(value) and not hasattr(value, "__get__"):
                members[key] = namespace.pop(key)
        cls = super().__new__(mcls, name, bases, namespace)
        cls._member_map_ = {}
        cls._value2member_map_ = {}
        for key, value in members.items():
            if isinstance(value, auto):
                value = len(cls._member_map_) + 1
            member = int.__new__(cls, value) if issubclass(cls, int) else object.__new__(cls)
            member._name_, member._value_ = key, value
            cls._member_map_[key] = cls._value2member_map_[value] = member
            setattr(cls, key, member)
        return cls

    def __call__(cls, value):
        try:
            return cls._value2member_map_[value]
        except KeyError:
            found = cls._missing_(value)
            if found is None:
                raise ValueError(f"{value!r} is not a valid {cls.__name__}") from None
            return found

    def __iter__(cls):
        return iter(cls._member_map_.values())

    def __len__(cls):
        return len(cls._member_map_)

    def __contains__(cls, value):
        return isinstance(value, cls) or value in cls._value2member_map_

    def __getitem__(cls, name):
        return cls._member_map_[name]


EnumType = EnumMeta


class Enum(metaclass=EnumMeta):
    @classmethod
    def _missing_(cls, value):
        return None

    @property
    def name(self):
        return self._name_

    @property
    def value(self):
        return self._value_

    def __repr__(self):
        return f"<{type(self).__name__}.{self._name_}: {self._value_!r}>"

    def __reduce__(self):
        return type(self), (self._value_,)


class IntEnum(int, Enum):
    __str__ = int.__repr__
