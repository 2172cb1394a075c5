"""Generated from agent_proto/protos by packaging/protos.py; do not edit."""
