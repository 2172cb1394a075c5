# mypy: ignore-errors
"""The build has compared the versions: it imports the same generated modules with the complete library."""


class Domain:
    PUBLIC = None


def ValidateProtobufRuntimeVersion(*versions):
    pass
