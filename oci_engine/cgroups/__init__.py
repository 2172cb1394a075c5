"""Control groups, managed through their file systems: version 1 with its many trees, and version 2 with one."""
