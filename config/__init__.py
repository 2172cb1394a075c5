"""TOML configuration in, immutable typed sections out. Kata's own files load unchanged.

Knows nothing of containers or machines; whoever needs a setting is given its section.
"""

from config.errors import ConfigError, Problem
from config.load import LoadedConfig, load
from config.schema import Agent, Config, Factory, Qemu, Runtime
from config.sizing import PodResources
from config.validate import HostLimits

__all__ = [
    "Agent",
    "Config",
    "ConfigError",
    "Factory",
    "HostLimits",
    "LoadedConfig",
    "PodResources",
    "Problem",
    "Qemu",
    "Runtime",
    "load",
]
