"""From a `VmSpec` to a running virtual machine. Knows neither containerd nor OCI.

Start at `spec.py` (what), `qemu/cmdline.py` (what QEMU is told and why) and `qemu/machine.py` (how it comes
to life). Importing this package imports none of them: what starts fast imports only what it needs.
"""
