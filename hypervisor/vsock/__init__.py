"""Streams between host and guest: one contract (`base`), two ways to have it (`vhost`, `user`)."""

from hypervisor.vsock.base import HOST_CID, Vsock

__all__ = ["HOST_CID", "Vsock"]
