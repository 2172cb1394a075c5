"""Generated from shim/api/protos by packaging/protos.py; do not edit."""
