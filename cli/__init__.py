"""`kata-py`, the command line tool for people: builds guests, checks hosts and configurations.

containerd never calls it, and the shim never imports it.
"""
