"""Keys that ask for something this version does not have: refused, or named in a warning."""

from config.describe import show
from config.errors import Problem
from config.schema import Config, Section, info
from config.tree import KeyPath, Report


def check_effects(config: Config, report: Report) -> list[Problem]:
    """Report refused keys; give a remark for each accepted one that has no effect although it was set.

    Only values that differ from the built-in default count: whoever writes a default down asks for nothing.
    """
    warned: list[Problem] = []
    for where, section in (
        (("hypervisor", config.runtime.hypervisor_name), config.hypervisor),
        (("agent", config.runtime.agent_name), config.agent),
        (("runtime",), config.runtime),
        (("factory",), config.factory),
    ):
        _check_section(section, where, report, warned)
    return warned


def _check_section(section: Section, where: KeyPath, report: Report, warned: list[Problem]) -> None:
    defaults = type(section)()
    for name in section.__struct_fields__:
        value, default = getattr(section, name), getattr(defaults, name)
        if value == default:
            continue
        if isinstance(value, Section):
            _check_section(value, (*where, name), report, warned)
            continue
        said = info(type(section), name)
        if said.effect == "refused":
            remedy = said.hint or f"remove the key or set it to {show(default)}"
            report.add((*where, name), f"not supported in this version: {said.why}", remedy)
        elif said.effect == "warned":
            warned.append(report.problem((*where, name), f"no effect in this version: {said.why}", said.hint))
