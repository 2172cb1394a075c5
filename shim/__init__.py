"""containerd's view of kata-py: the shim program, its Task service and the sandbox behind it."""

VERSION = "0.1.0"
RUNTIME_NAME = "io.containerd.kata-py.v2"
