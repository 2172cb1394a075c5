# mypy: ignore-errors
"""Tracebacks as file, line and function: there are no sources in the guest to quote from."""

import sys


def walk_tb(tb):
    while tb is not None:
        yield tb.tb_frame, tb.tb_lineno
        tb = tb.tb_next


def format_tb(tb, limit=None):
    return [
        f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}\n'
        for frame, line in walk_tb(tb)
    ][:limit]


def format_exception_only(exc, value=None, /):
    error = exc if isinstance(exc, BaseException) else value
    return [f"{type(error).__qualname__}: {error}\n"]


def format_exception(exc, value=None, tb=None, limit=None, chain=True):
    error = exc if isinstance(exc, BaseException) else value
    lines = []
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chain and cause is not None:
        lines += [*format_exception(cause), "which led to:\n"]
    if error.__traceback__ is not None:
        lines += ["Traceback (most recent call last):\n", *format_tb(error.__traceback__, limit)]
    return lines + format_exception_only(error)


def format_exc():
    error = sys.exc_info()[1]
    return "".join(format_exception(error)) if error is not None else "NoneType: None\n"


def print_exception(exc, value=None, tb=None, limit=None, file=None, chain=True):
    (file or sys.stderr).write("".join(format_exception(exc, value, tb, limit, chain)))


def print_exc(limit=None, file=None):
    (file or sys.stderr).write(format_exc())


def extract_stack(f=None, limit=None):
    return []


class StackSummary(list):
    """An empty one: debug mode of the event loop is the only user, and it is off in the guest."""

    @classmethod
    def extract(cls, frame_gen, *, limit=None, lookup_lines=True, capture_locals=False):
        return cls()
