"""What `runk features` tells: the names that specifications may use, in the OCI's own form for that."""

from __future__ import annotations

from oci_engine import seccomp
from oci_engine.capabilities import NAMES
from oci_engine.linux_spec import NAMESPACES
from oci_engine.mount_options import known_words
from oci_engine.spec import HOOKS


def features(version: str, spec_version: str) -> dict[str, object]:
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": spec_version,
        "hooks": list(HOOKS),
        "mountOptions": known_words(),
        "linux": {
            "namespaces": sorted(NAMESPACES),
            "capabilities": list(NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": sorted(seccomp.ACTIONS),
                "operators": sorted(seccomp.OPERATORS),
                "archs": sorted(seccomp.ARCHITECTURES),
                "knownFlags": sorted(seccomp.FLAGS),
                "supportedFlags": sorted(seccomp.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": {"runk.version": version},
    }
