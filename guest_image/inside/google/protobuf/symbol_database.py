# mypy: ignore-errors
def Default():
    return None
