# mypy: ignore-errors
"""Runs in the guest's interpreter, not in ours: imports what it is told and prints the modules that brought in.

stdin: first line the directory of replacement modules, then one module name per line.
stdout: JSON {"magic", "modules": [{"name", "origin", "package", "code"}]}, the bytecode in base64, or null for a
module that is a shared library. Built-in and frozen modules are left out: the interpreter has them inside.

Nothing may be imported before the replacements are in force that one of them replaces.
"""

import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder, SourceFileLoader


class Replacements:
    """Finds modules in the directory of replacements first; their submodules may be replaced or not."""

    def __init__(self, directory):
        self.directory = directory

    def find_spec(self, name, path=None, target=None):
        relative = name.replace(".", "/")
        for file, is_package in ((f"{relative}/__init__.py", True), (f"{relative}.py", False)):
            origin = f"{self.directory}/{file}"
            try:
                open(origin).close()
            except OSError:
                continue
            spec = ModuleSpec(name, SourceFileLoader(name, origin), origin=origin, is_package=is_package)
            spec.has_location = True
            if is_package:
                original = PathFinder.find_spec(name, path)
                spec.submodule_search_locations = list(
                    getattr(original, "submodule_search_locations", None) or []
                )
            return spec
        return None


def imported(names):
    """(name, origin, is package) of every module that comes from a file, after importing the names."""
    for name in names:
        __import__(name)
    found = []
    for name, module in sorted(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or spec.name != name or spec.origin in (None, "built-in", "frozen"):
            continue
        found.append((name, spec.origin, spec.submodule_search_locations is not None))
    return found


def bytecode(name, origin, is_package):
    """Marshalled code with what a traceback needs, and no more: line numbers, and short file names.

    Docstrings, asserts and annotations of functions stay out: reading them in is a fifth of the time that importing
    takes. Annotations of classes stay, because named tuples are made of them.
    """
    import ast
    import marshal

    class WithoutAnnotations(ast.NodeTransformer):
        def visit_arg(self, node):
            node.annotation = None
            return node

        def visit_FunctionDef(self, node):
            node.returns = None
            return self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef

    with open(origin, "rb") as file:
        tree = WithoutAnnotations().visit(ast.parse(file.read(), origin))
    short = name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
    return marshal.dumps(compile(tree, short, "exec", dont_inherit=True, optimize=2))


def main():
    directory, *names = sys.stdin.read().splitlines()
    replacements = Replacements(directory)
    sys.meta_path.insert(0, replacements)
    found = imported(names)
    # From here on the real standard library again, for our own use.
    sys.meta_path.remove(replacements)
    for name, _origin, _is_package in found:
        if not name.startswith("encodings"):
            sys.modules.pop(name, None)
    import base64
    import json
    from importlib.util import MAGIC_NUMBER

    modules = []
    for name, origin, is_package in found:
        path = origin
        if name.partition(".")[0] == "encodings":
            # The interpreter imported its own before it ran us.
            replacement = replacements.find_spec(name)
            if replacement is None:
                continue
            path = replacement.origin
        code = base64.b64encode(bytecode(name, path, is_package)).decode() if path.endswith(".py") else None
        modules.append({"name": name, "origin": path, "package": is_package, "code": code})
    json.dump({"magic": base64.b64encode(MAGIC_NUMBER).decode(), "modules": modules}, sys.stdout)


if __name__ == "__main__":
    main()
