# mypy: ignore-errors
"""Loggers that hand every record to the handlers of the one root logger. Levels are the handlers' business."""

import sys

DEBUG, INFO, WARNING, ERROR, CRITICAL = 10, 20, 30, 40, 50
_NAMES = {DEBUG: "DEBUG", INFO: "INFO", WARNING: "WARNING", ERROR: "ERROR", CRITICAL: "CRITICAL"}
_handlers = []


class LogRecord:
    def __init__(self, name, level, message, args, error):
        self.name = name
        self.levelno = level
        self.levelname = _NAMES.get(level, "INFO")
        self.exc_info = None if error is None else (type(error), error, error.__traceback__)
        self._message = message
        self._args = args

    def getMessage(self):
        return self._message % self._args if self._args else str(self._message)


class Handler:
    def emit(self, record):
        raise NotImplementedError


class Logger:
    def __init__(self, name):
        self.name = name

    def addHandler(self, handler):
        _handlers.append(handler)

    def log(self, level, message, *args, exc_info=None, **ignored):
        error = exc_info if isinstance(exc_info, BaseException) or not exc_info else sys.exc_info()[1]
        for handler in _handlers:
            handler.emit(LogRecord(self.name, level, message, args, error or None))

    def debug(self, message, *args, **options):
        self.log(DEBUG, message, *args, **options)

    def info(self, message, *args, **options):
        self.log(INFO, message, *args, **options)

    def warning(self, message, *args, **options):
        self.log(WARNING, message, *args, **options)

    def error(self, message, *args, **options):
        self.log(ERROR, message, *args, **options)

    def critical(self, message, *args, **options):
        self.log(CRITICAL, message, *args, **options)

    def exception(self, message, *args, **options):
        self.log(ERROR, message, *args, exc_info=True, **options)

    def isEnabledFor(self, level):
        return level > DEBUG


def getLogger(name="root"):
    return Logger(name)
