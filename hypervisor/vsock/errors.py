"""Errors of the user-space virtio-vsock device.

    ConnectionResetError
      DeviceBroken         the device serves no longer; what callers of `UserVsock` see
    Exception
      GuestViolation       the guest broke a rule of the virtqueue; ends the device, not the shim
      FrontEndViolation    the VMM broke a rule of the vhost-user protocol; likewise

The two violations stay inside the package: the device turns them into one `DeviceBroken`, with the
violation as its cause.
"""


class DeviceBroken(ConnectionResetError):
    """The vsock device serves no longer; the text says who ended it and why."""


class GuestViolation(Exception):
    """What the guest left in its memory cannot be followed safely."""


class FrontEndViolation(Exception):
    """A message of the VMM is malformed, or asks for what was not negotiated."""
