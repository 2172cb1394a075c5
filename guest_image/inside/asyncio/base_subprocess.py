"""The agent starts programs by itself; the event loop's class for them only has to exist."""


class BaseSubprocessTransport:
    pass
