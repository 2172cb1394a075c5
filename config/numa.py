"""Lists of NUMA nodes as Linux writes them, `0,2-3`: the entries of `numa_mapping`, and what the host says."""

import re

# Of Linux (CONFIG_NODES_SHIFT is 10 at most), and of QEMU (MAX_NODES).
_LAST_HOST_NODE = 1023
MOST_GUEST_NODES = 128

_LIST = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", re.ASCII)


def nodes_of(text: str) -> tuple[int, ...]:
    """The numbers, in order and each once. Raises ValueError with what is wanted instead."""
    if not _LIST.fullmatch(text):
        raise ValueError('want nodes of the host, as in "0" or "0,2-3"')
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) <= _LAST_HOST_NODE:
            raise ValueError(f"want numbers up to {_LAST_HOST_NODE}, the smaller one first")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
