"""Constants the event loop looks at; the agent starts programs by posix_spawn and reaps them itself."""

PIPE, STDOUT, DEVNULL = -1, -2, -3
