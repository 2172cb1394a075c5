# mypy: ignore-errors
from google._upb._message import default_pool


def Default():
    return default_pool
