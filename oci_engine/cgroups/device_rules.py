"""Which devices a container may use: its rules, and those that make the devices of every container usable.

The last rule that speaks of a device and of a kind of access decides.
"""

from __future__ import annotations

from oci_engine.resources_spec import DeviceRule


def _allow(kind: str, major: int | None, minor: int | None, access: str = "rwm") -> DeviceRule:
    return DeviceRule(allow=True, type=kind, major=major, minor=minor, access=access)


#: To make any device is harmless while it cannot be opened. The rest are the default devices, and terminals.
ALWAYS = (
    _allow("c", None, None, "m"), _allow("b", None, None, "m"),
    _allow("c", 1, 3), _allow("c", 1, 5), _allow("c", 1, 7), _allow("c", 1, 8), _allow("c", 1, 9),
    _allow("c", 5, 0), _allow("c", 5, 2), _allow("c", 136, None),
)  # fmt: skip
DENY_ALL = DeviceRule(allow=False, type="a", major=None, minor=None, access="rwm")


def complete(rules: tuple[DeviceRule, ...]) -> tuple[DeviceRule, ...]:
    """The rules to enforce. A container without any may use nothing but what every one has."""
    return (DENY_ALL, *rules, *ALWAYS)


def covers_everything(rule: DeviceRule) -> bool:
    """Whether nothing that came before it matters any more."""
    return rule.type == "a" and rule.major is None and rule.minor is None and set(rule.access) == set("rwm")


def v1_lines(rules: tuple[DeviceRule, ...]) -> list[tuple[str, str]]:
    """File and line for each rule, for the controller of version 1."""
    lines = []
    for rule in rules:
        file = "devices.allow" if rule.allow else "devices.deny"
        if covers_everything(rule):
            lines.append((file, "a"))
            continue
        # The kernel takes no numbers with `a`, so it is two rules.
        major, minor = ("*" if number is None else str(number) for number in (rule.major, rule.minor))
        kinds = ("b", "c") if rule.type == "a" else (rule.type,)
        lines += [(file, f"{kind} {major}:{minor} {rule.access}") for kind in kinds]
    return lines
