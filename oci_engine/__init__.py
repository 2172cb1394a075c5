"""A container engine: from an OCI runtime specification to a running container, on Linux alone.

It knows the specification and the kernel, and nothing of who calls it. A container's process is a fork of the
calling interpreter, whatever threads or loops that has: all decisions are made before the fork and handed over
as plain data (`plan.py`); what runs between fork and exec (`child.py`) only carries them out.
"""
