# mypy: ignore-errors
"""The questions that asyncio asks of functions and coroutines."""

import types

CO_COROUTINE = 0x80


def iscoroutinefunction(function):
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    function = getattr(function, "__func__", function)
    return isinstance(function, types.FunctionType) and bool(function.__code__.co_flags & CO_COROUTINE)


def markcoroutinefunction(function):
    return function


def iscoroutine(value):
    return isinstance(value, types.CoroutineType)


def isgenerator(value):
    return isinstance(value, types.GeneratorType)


def isfunction(value):
    return isinstance(value, types.FunctionType)


def isawaitable(value):
    return isinstance(value, types.CoroutineType) or hasattr(type(value), "__await__")


def unwrap(function):
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
