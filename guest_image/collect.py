# mypy: ignore-errors
"""Runs in the guest's interpreter, not in ours: imports what it is told and prints the modules that brought in.

stdin: first line the directory of replacement modules, then names of modules; those in one line are a group.
stdout: JSON {"magic", "modules": [{"name", "origin", "package", "code"}], "groups": [{"names", "code"}]}, the bytecode
in base64, or null for a module that is a shared library. A group has all that its names brought in and no group before
it has, in the order in which these imports ended, but for modules that import each other; its bytecode is [(name, is
package, code)]. Built-in and frozen modules are left out: the interpreter has them inside.

Nothing may be imported before the replacements are in force that one of them replaces.
"""

import builtins
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import PathFinder, SourceFileLoader, _LoaderBasics


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


def imported(lines):
    """After importing all names: (name, origin, is package) of every module that comes from a file, and the names of
    those of each group."""
    ended, begun, circular = [], [], set()

    def exec_module(self, module):
        begun.append(module.__name__)
        try:
            usual_exec(self, module)
        finally:
            begun.pop()
        ended.append(module.__name__)

    def import_(name, namespace=None, local=None, names=(), level=0):
        module = usual_import(name, namespace, local, names, level)
        package = (namespace or {}).get("__package__") or ""
        base = name
        if level:
            base = ".".join(filter(None, (package.rsplit(".", level - 1)[0], name)))
        # Whoever is in the middle of its own import, and no package of the importer's, imports in a circle.
        for wanted in (base, *(f"{base}.{each}" for each in names or ())):
            if wanted in begun[:-1] and not begun[-1].startswith(f"{wanted}."):
                circular.update(begun[begun.index(wanted) :])
        return module

    usual_exec, usual_import = _LoaderBasics.exec_module, builtins.__import__
    _LoaderBasics.exec_module, builtins.__import__ = exec_module, import_
    groups = []
    for line in lines:
        before = len(ended)
        for name in line.split():
            __import__(name)
        if " " in line:
            groups.append(ended[before:])
    _LoaderBasics.exec_module, builtins.__import__ = usual_exec, usual_import
    groups = [[name for name in group if name not in circular] for group in groups]
    found = []
    for name, module in sorted(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or spec.name != name or spec.origin in (None, "built-in", "frozen"):
            continue
        found.append((name, spec.origin, spec.submodule_search_locations is not None))
    return found, groups


def bytecode(name, origin, is_package):
    """Code with what a traceback needs, and no more: line numbers, and short file names.

    Docstrings, asserts and annotations of functions stay out: reading them in is a fifth of the time that importing
    takes. Annotations of classes stay, because named tuples are made of them.
    """
    import ast

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
    return compile(tree, short, "exec", dont_inherit=True, optimize=2)


def main():
    directory, *names = sys.stdin.read().splitlines()
    replacements = Replacements(directory)
    sys.meta_path.insert(0, replacements)
    found, groups = imported(names)
    # From here on the real standard library again, for our own use.
    sys.meta_path.remove(replacements)
    for name, _origin, _is_package in found:
        if not name.startswith("encodings"):
            sys.modules.pop(name, None)
    import base64
    import json
    import marshal
    from importlib.util import MAGIC_NUMBER

    def packed(value):
        return base64.b64encode(marshal.dumps(value)).decode()

    modules = []
    codes = {}
    for name, origin, is_package in found:
        path = origin
        if name.partition(".")[0] == "encodings":
            # The interpreter imported its own before it ran us.
            replacement = replacements.find_spec(name)
            if replacement is None:
                continue
            path = replacement.origin
        code = None
        if path.endswith(".py"):
            codes[name] = (name, is_package, bytecode(name, path, is_package))
            code = packed(codes[name][2])
        modules.append({"name": name, "origin": path, "package": is_package, "code": code})
    json.dump(
        {
            "magic": base64.b64encode(MAGIC_NUMBER).decode(),
            "modules": modules,
            "groups": [{"names": group, "code": packed([codes[name] for name in group])} for group in groups],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
