"""What containerd and a shim say to each other: messages, services, event bodies.

`protos` holds the definitions, `gen` the modules generated from them (packaging/protos.py), `services` the
services described for ttrpc. This file imports nothing: `start` and `delete` pay only for the modules they
name.
"""
