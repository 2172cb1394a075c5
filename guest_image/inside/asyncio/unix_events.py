# mypy: ignore-errors
"""The event loop of the guest: the standard library's with sockets, and signals. Nothing of programs and pipes."""

import signal
from asyncio.selector_events import BaseSelectorEventLoop
from functools import partial


class SelectorEventLoop(BaseSelectorEventLoop):
    def __init__(self, selector=None):
        super().__init__(selector)
        self._handlers = {}

    def add_signal_handler(self, number, callback, *args):
        # The interpreter writes the signal's number there, which wakes the loop up.
        signal.set_wakeup_fd(self._csock.fileno())
        self._handlers[number] = partial(callback, *args)
        signal.signal(number, _nothing)
        signal.siginterrupt(number, False)

    def remove_signal_handler(self, number):
        if self._handlers.pop(number, None) is None:
            return False
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if not self._handlers:
            signal.set_wakeup_fd(-1)
        return True

    def close(self):
        super().close()
        for number in list(self._handlers):
            self.remove_signal_handler(number)

    def _process_self_data(self, data):
        for number in data:  # a zero is a wake-up without a signal
            if number in self._handlers:
                self.call_soon(self._handlers[number])


def _nothing(number, frame):
    """A signal without a handler of Python's would not be written either."""
