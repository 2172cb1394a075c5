"""The class that the event loop tells its own futures from; the guest has no other threads to wait for."""

FIRST_COMPLETED = "FIRST_COMPLETED"
FIRST_EXCEPTION = "FIRST_EXCEPTION"
ALL_COMPLETED = "ALL_COMPLETED"


class Future:
    pass


class CancelledError(Exception):
    pass
