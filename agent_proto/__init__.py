"""What the host and the agent in the guest say to each other.

`protos` holds the messages and services, `gen` the modules generated from them (packaging/protos.py),
`services` the same services described for ttrpc, `client` the host's typed client. This file imports
nothing: a process that needs one message pays for one module.
"""
