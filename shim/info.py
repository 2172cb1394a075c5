"""The `-info` action: what this runtime is and what it understands, as containerd 2 asks for it.

containerd runs it before a container with id-mapped mounts, and for `ctr plugins inspect-runtime`. The features are
JSON by the runtime-spec's features.md, kept as text: a JSON module would take longer to load than the rest takes.
"""

import os

from shim import RUNTIME_NAME, VERSION
from shim.bootstrap import config_path
from shim.protowire import bytes_field

# The name under which containerd packs that JSON into an Any.
FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
# The guest runs containers with a cgroup v2 tree of its own, whatever the host has. What is neither granted nor refused
# by the shim, as the architectures of seccomp, is left out: that means "unknown".
FEATURES = """\
{
 "ociVersionMin": "1.0.0",
 "ociVersionMax": "1.2.0",
 "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
 "mountOptions": [
  "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "iversion", "loud", "mand", "noatime",
  "nodev", "nodiratime", "noexec", "noiversion", "nomand", "norelatime", "nostrictatime", "nosuid", "private", "rbind",
  "relatime", "remount", "ro", "rprivate", "rshared", "rslave", "runbindable", "rw", "shared", "silent", "slave",
  "strictatime", "suid", "sync", "unbindable"
 ],
 "linux": {
  "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
  "capabilities": [
   "CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
   "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
   "CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN",
   "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID",
   "CAP_SETPCAP", "CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE",
   "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
   "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM"
  ],
  "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
  "seccomp": {
   "enabled": true,
   "actions": [
    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
   ],
   "operators": [
    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
   ]
  },
  "apparmor": {"enabled": false},
  "selinux": {"enabled": false},
  "intelRdt": {"enabled": false},
  "mountExtensions": {"idmap": {"enabled": false}}
 },
 "annotations": {"io.kata-py.hypervisor": "qemu"}
}
"""


def runtime_info(options: bytes) -> bytes:
    """The serialized `containerd.types.RuntimeInfo`: name, version, features, and the options that we understand.

    `options` is the serialized `google.protobuf.Any` from stdin; anything else is ignored.
    """
    version = bytes_field(1, VERSION) + bytes_field(2, revision())
    info = bytes_field(1, RUNTIME_NAME) + bytes_field(2, version)
    if config_path(options) is not None:
        info += bytes_field(3, options)
    return info + bytes_field(4, bytes_field(1, FEATURES_URL) + bytes_field(2, FEATURES))


def revision() -> str:
    """The commit that was installed; empty in a checkout."""
    try:
        with open(f"{os.path.dirname(os.path.dirname(__file__))}/REVISION") as file:
            return file.read().strip()
    except OSError:
        return ""
