"""The modules that replace large ones in the guest, tried with this interpreter, whatever its version."""

# The classes here are made of modules that the type checker cannot see.
# mypy: disable-error-code="attr-defined, index, misc, name-defined, no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import base64
import importlib.util
import json
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from guest_image.contents import BUNDLE, Contents
from guest_image.cpio import Tree
from guest_image.python_set import AGENT_PACKAGES, GROUPS, INSIDE, Bytecode, Group, ModuleSet, modules_of
from guest_image.tools import Root

REPOSITORY = Path(__file__).parents[3]


def load(name: str) -> Any:
    """One of the replacements, beside the real module."""
    path = INSIDE / f"{name.replace('.', '/')}.py"
    if not path.exists():
        path = INSIDE / name.replace(".", "/") / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"inside_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module, ModuleType)
    return module


@pytest.fixture(scope="module")
def collected() -> list[dict[str, Any]]:
    """What the builder would put into an image with this interpreter and the agent of this tree."""
    entries = [*modules_of("guest_agent", REPOSITORY), *modules_of("oci_engine", REPOSITORY)]
    site = Path(importlib.import_module("google.protobuf").__path__[0]).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-s", str(REPOSITORY / "guest_image" / "collect.py")],
        input="\n".join([str(INSIDE), "bundle", *entries]),
        env={"PYTHONPATH": f"{REPOSITORY}:{site}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    modules: list[dict[str, Any]] = json.loads(done.stdout)["modules"]
    return modules


def test_the_agent_imports_with_the_replacements(collected: list[dict[str, Any]]) -> None:
    names = {module["name"] for module in collected}
    assert {
        "guest_agent.server",
        "ttrpc.server",
        "agent_proto.gen.agent_pb2",
        "asyncio.base_events",
        "bundle",
    } <= names
    assert any(module["name"] == "google._upb._message" and module["code"] is None for module in collected)


@pytest.mark.parametrize(
    "name",
    ["re", "json.encoder", "ctypes", "ast", "copy", "tokenize", "random", "hashlib", "_ssl", "pickle"],
)
def test_what_costs_time_at_start_stays_out(collected: list[dict[str, Any]], name: str) -> None:
    assert name not in {module["name"] for module in collected}


def test_every_replacement_is_used(collected: list[dict[str, Any]]) -> None:
    """One that nothing imports any more is to be deleted. ssl is there to fail."""
    used = {module["origin"] for module in collected}
    ours = {str(path) for path in INSIDE.rglob("*.py")} - {str(INSIDE / "ssl.py")}
    assert ours - used == set()


def test_nothing_but_the_allowed_packages_is_imported(collected: list[dict[str, Any]]) -> None:
    for module in collected:
        allowed = (str(INSIDE), sys.base_prefix, "/usr/lib")
        ours = module["name"].partition(".")[0] in (*AGENT_PACKAGES, "google")
        assert ours or module["origin"].startswith(allowed), module["name"]


# The importer


PACKAGE = {
    "pack": "from pack.part import value",
    "pack.part": "from pack import other\nvalue = other.value + 1\nseen = __package__",
    "pack.other": "value = 41\nimport pack.circle",
    # Goes back to whoever imports it.
    "pack.circle": "from pack.other import value",
    "pack.late": "from . import part\nvalue = part.value",
}


def run_from_bundle(folder: Path, groups: list[list[str]], program: str) -> list[str]:
    """What a program prints that finds PACKAGE in a bundle, with these groups."""
    import marshal

    def code(name: str) -> CodeType:
        return compile(PACKAGE[name], "x", "exec")

    source = (INSIDE / "bundle.py").read_text()
    early = Bytecode("bundle", INSIDE / "bundle.py", False, marshal.dumps(compile(source, "x", "exec")))
    modules = [Bytecode(name, Path(__file__), name == "pack", marshal.dumps(code(name))) for name in PACKAGE]
    together = tuple(
        Group(tuple(names), marshal.dumps([(name, name == "pack", code(name)) for name in names]))
        for names in groups
    )
    contents = Contents(Tree(), Root(folder, "amd64", {}))
    magic = importlib.util.MAGIC_NUMBER
    contents.python(ModuleSet((early, *modules), (), magic, together), "python3.x")
    files = dict(contents.tree)
    assert stat.S_ISREG(files["usr/lib/python3.x/os.pyc"].mode)
    (folder / "bundle.pyc").write_bytes(files["usr/lib/python3.x/bundle.pyc"].data)
    (folder / "modules").write_bytes(files[BUNDLE.lstrip("/")].data)
    script = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        f"import bundle; bundle.install({str(folder / 'modules')!r})\n{program}"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


#: As their imports end when `pack` is imported.
IN_ORDER = ["pack.part", "pack"]


@pytest.mark.parametrize("groups", [[], [IN_ORDER], [["pack.part"], ["pack"]]])
def test_modules_come_out_of_the_bundle(tmp_path: Path, groups: list[list[str]]) -> None:
    program = (
        "import pack; print(pack.value, pack.__path__, sys.path)\n"
        "import pack.part as part; print(pack.part is part is sys.modules['pack.part'], part.seen)\n"
        "print('pack.late' in sys.modules)\n"
        "from pack.late import value; print(value, pack.late.__name__)\n"
        "try: import nothing\n"
        "except ModuleNotFoundError: print('not there')"
    )
    said = run_from_bundle(tmp_path, groups, program)
    assert said == ["42 [] []", "True pack", "False", "42 pack.late", "not there"]


def test_a_group_by_any_of_its_modules(tmp_path: Path) -> None:
    program = (
        "import pack.part; print(pack.part.value, pack.value)\n"
        "from pack import other; print(pack.circle is sys.modules['pack.circle'], pack.other is other)"
    )
    said = run_from_bundle(tmp_path, [IN_ORDER], program)
    assert said == ["42 42", "True True"]


def test_modules_that_import_each_other_are_in_no_group(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    for name, source in PACKAGE.items():
        (folder / f"{name.partition('.')[2] or '__init__'}.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-s", str(REPOSITORY / "guest_image" / "collect.py")],
        input=f"{tmp_path / 'none'}\npack pack.late\npack.circle",
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [group["names"] for group in json.loads(done.stdout)["groups"]] == [
        ["pack.part", "pack", "pack.late"]
    ]


def test_groups_are_what_is_imported_together() -> None:
    """Of this tree: nothing is in two groups, and a group has all that its modules need and no group before it has."""
    site = Path(importlib.import_module("google.protobuf").__path__[0]).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-s", str(REPOSITORY / "guest_image" / "collect.py")],
        input="\n".join([str(INSIDE), "bundle", *map(" ".join, GROUPS)]),
        env={"PYTHONPATH": f"{REPOSITORY}:{site}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    groups = [group["names"] for group in answer["groups"]]
    assert len(groups) == len(GROUPS)
    for wanted, got in zip(GROUPS, groups, strict=True):
        assert set(wanted) <= set(got)
    together = [name for group in groups for name in group]
    assert len(together) == len(set(together))
    early = {"bundle", "encodings"}
    assert set(together) == {module["name"] for module in answer["modules"] if module["code"]} - early
    assert "asyncio" in groups[1]
    assert "guest_agent.network" not in together


def test_bytecode_is_what_this_interpreter_reads(collected: list[dict[str, Any]]) -> None:
    import marshal

    code = next(module["code"] for module in collected if module["name"] == "guest_agent.errors")
    namespace: dict[str, Any] = {"__name__": "errors"}
    exec(marshal.loads(base64.b64decode(code)), namespace)
    assert namespace["NotFound"].__mro__[1] is namespace["AgentError"]
    assert namespace["NotFound"].__doc__ is None  # documentation stays on the host


# Single replacements


def test_named_tuples() -> None:
    typing = load("typing")

    class Point(typing.NamedTuple):
        x: int
        y: int = 5

        def sum(self):
            return self.x + self.y

    assert Point(1) == (1, 5)
    assert Point(x=2, y=3).sum() == 5
    assert Point(1, 2)._replace(y=9) == (1, 9)
    assert repr(Point(1)) == "Point(x=1, y=5)"
    assert isinstance(Point(1), tuple)
    x, y = Point(7)
    assert (x, y) == (7, 5)
    for wrong in ((), (1, 2, 3)):
        with pytest.raises(TypeError, match="Point takes x, y"):
            Point(*wrong)
    with pytest.raises(TypeError):
        Point(1, z=2)


def test_generic_classes_are_plain_classes() -> None:
    typing = load("typing")
    variable = typing.TypeVar("variable", bound=int)

    class Box(typing.Generic[variable]):
        pass

    assert Box.__mro__ == (Box, object)


def test_enumerations() -> None:
    enum = load("enum")

    class Code(enum.IntEnum):
        OK = 0
        BAD = 3

        @classmethod
        def _missing_(cls, value):
            return cls.BAD

        def text(self):
            return f"{self.name}={self.value}"

    assert Code.BAD == 3
    assert Code(0) is Code.OK
    assert Code(99) is Code.BAD
    assert Code["OK"] is Code.OK
    assert list(Code) == [Code.OK, Code.BAD]
    assert Code.BAD.text() == "BAD=3"
    assert f"{Code.BAD}" == "3"
    assert 3 in Code
    assert 4 not in Code
    assert len(Code) == 2
    assert {Code.BAD: 1}[3] == 1

    class Colour(enum.Enum):
        RED = "red"
        GREEN = enum.auto()

    assert Colour("red") is Colour.RED
    assert Colour.GREEN.value == 2
    assert repr(Colour.RED) == "<Colour.RED: 'red'>"
    with pytest.raises(ValueError, match="'blue' is not a valid Colour"):
        Colour("blue")


def test_tracebacks_name_files_lines_and_causes() -> None:
    traceback = load("traceback")
    try:
        try:
            raise ValueError("first")
        except ValueError as err:
            raise KeyError("second") from err
    except KeyError as err:
        text = "".join(traceback.format_exception(err))
    assert text.index("ValueError: first") < text.index("which led to:") < text.index("KeyError: 'second'")
    assert f'File "{__file__}", line ' in text
    assert "in test_tracebacks_name_files_lines_and_causes" in text


def test_loggers_hand_records_on() -> None:
    logging = load("logging")
    seen: list[Any] = []

    class Collect(logging.Handler):
        def emit(self, record: Any) -> None:
            seen.append((record.name, record.levelname, record.getMessage(), record.exc_info))

    log = logging.getLogger("name")
    log.warning("nobody listens %s", 1)
    log.addHandler(Collect())
    log.warning("%s of %s", 1, 2)
    error = ValueError("x")
    log.error("went wrong", exc_info=error)
    assert seen == [
        ("name", "WARNING", "1 of 2", None),
        ("name", "ERROR", "went wrong", (ValueError, error, None)),
    ]


def test_wrapping_functions() -> None:
    functools = load("functools")

    def original(a: int) -> int:
        """Text."""
        return a

    @functools.wraps(original)
    def wrapper(a: int) -> int:
        return a + 1

    assert (wrapper.__name__, wrapper.__doc__, wrapper.__wrapped__, wrapper(1)) == (
        "original",
        "Text.",
        original,
        2,
    )


def test_coroutine_functions_are_known() -> None:
    inspect = load("inspect")

    async def coroutine() -> None: ...

    class Some:
        async def method(self) -> None: ...

    import functools

    assert inspect.iscoroutinefunction(coroutine)
    assert inspect.iscoroutinefunction(Some().method)
    assert inspect.iscoroutinefunction(functools.partial(coroutine))
    assert not inspect.iscoroutinefunction(load)
    made = coroutine()
    assert inspect.iscoroutine(made)
    made.close()


def test_sockets() -> None:
    socket = load("socket")
    first, second = socket.socketpair()
    with first, second:
        first.send(b"x")
        assert second.recv(10) == b"x"
        assert type(first).__name__ == "socket"
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(b"\0test-inside-socket")
        listener.listen(1)
        client = socket.socket(socket.AF_UNIX)
        with client:
            client.connect(b"\0test-inside-socket")
            accepted, _ = listener.accept()
            with accepted:
                client.send(b"y")
                assert accepted.recv(10) == b"y"
                assert accepted.type == socket.SOCK_STREAM


@pytest.mark.parametrize(
    "module", [load("selectors"), importlib.import_module("selectors")], ids=["ours", "real"]
)
def test_selectors(module: Any) -> None:
    selector = module.DefaultSelector()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert selector.select(0) == []
        selector.register(ours, module.EVENT_READ, "first")
        with pytest.raises(KeyError):
            selector.register(ours.fileno(), module.EVENT_READ)
        assert selector.select(0.0001) == []
        theirs.send(b"x")
        ((key, events),) = selector.select(None)
        assert (key.fileobj, key.fd, key.data, events) == (ours, ours.fileno(), "first", module.EVENT_READ)
        selector.modify(ours.fileno(), module.EVENT_READ | module.EVENT_WRITE, "second")
        ((key, events),) = selector.select(-1)
        assert (key.data, events) == ("second", module.EVENT_READ | module.EVENT_WRITE)
        selector.modify(ours, module.EVENT_WRITE)
        ours.recv(1)
        theirs.close()
        # The other side's end is told to whoever waits for anything.
        assert [events for _, events in selector.select()] == [module.EVENT_WRITE]
        assert selector.get_key(ours).events == module.EVENT_WRITE
        ours.close()
        assert selector.unregister(ours).data is None
        with pytest.raises((KeyError, ValueError)):
            selector.get_key(ours)
        with pytest.raises(KeyError):
            selector.modify(1000, module.EVENT_READ)
        assert not selector.get_map()
    selector.close()


def test_signals_in_the_event_loop() -> None:
    """In a process of its own: signal handlers are the process's."""
    program = """
import os, signal, sys
import importlib.util
spec = importlib.util.spec_from_file_location("events", sys.argv[1] + "/asyncio/unix_events.py")
events = importlib.util.module_from_spec(spec)
spec.loader.exec_module(events)
loop = events.SelectorEventLoop()
seen = []

def handler(word):
    seen.append(word)
    loop.stop()

loop.add_signal_handler(signal.SIGUSR1, handler, "usr1")
loop.add_signal_handler(signal.SIGUSR2, handler, "usr2")
loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
loop.run_forever()
assert seen == ["usr1"], seen
assert loop.remove_signal_handler(signal.SIGUSR1)
assert not loop.remove_signal_handler(signal.SIGUSR1)
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
loop.call_soon(os.kill, os.getpid(), signal.SIGUSR2)
loop.run_forever()
loop.call_soon_threadsafe(loop.stop)
loop.run_forever()
loop.close()
assert seen == ["usr1", "usr2"], seen
assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(INSIDE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
