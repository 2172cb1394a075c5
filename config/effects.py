"""Keys that ask for something this version does not have: refused, or named in a warning."""

from config.describe import show
from config.schema import Config, Section, info
from config.tree import KeyPath, Report, dotted


def check_effects(config: Config, report: Report) -> list[str]:
    """Report refused keys; give the dotted names of accepted ones that have no effect although they were set.

    Only values that differ from the built-in default count: whoever writes a default down asks for nothing.
    """
    warned: list[str] = []
    for where, section in (
        (("hypervisor", config.runtime.hypervisor_name), config.hypervisor),
        (("agent", config.runtime.agent_name), config.agent),
        (("runtime",), config.runtime),
        (("factory",), config.factory),
    ):
        _check_section(section, where, report, warned)
    return warned


def _check_section(section: Section, where: KeyPath, report: Report, warned: list[str]) -> None:
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
            warned.append(dotted((*where, name)) + (f" ({said.hint})" if said.hint else ""))
