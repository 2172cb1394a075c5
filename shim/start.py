"""The `start` action: bind the pod's socket, fork the daemon, print where it listens.

containerd waits for this on every pod's way up, so it imports next to nothing: the daemon does its imports after
the fork, while containerd reads the answer and connects. containerd takes stdout and stderr together as the answer,
so nothing else may ever be printed.
"""

import os
import sys

from shim import paths
from shim.bootstrap import Bootstrap, read_stdin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.cli import Flags

_SOCKET_BACKLOG = 128
_AF_UNIX, _SOCK_STREAM, _SOCK_CLOEXEC = 1, 1, 0o2000000


def start(flags: "Flags") -> None:
    """Start the shim of the bundle in the working directory, or find the one of the pod it belongs to.

    Prints the address. Returns in the caller's process only; the daemon never returns.

    Raises:
        OSError, ValueError: one line that says what is wrong with the bundle, the id or the socket.
    """
    bundle = flags.bundle or os.getcwd()
    boot = Bootstrap(flags, os.environ, bundle)
    if not paths.valid_id(boot.id) or not boot.namespace:
        raise ValueError(f"need -id and -namespace, got id {boot.id!r} in namespace {boot.namespace!r}")
    boot.read_stdin(read_stdin())
    sandbox_id = boot.id if boot.sandbox_api else read_sandbox_id(bundle, boot.id)
    path = paths.socket_path(boot.socket_dir, boot.grpc_address, boot.namespace, sandbox_id)
    # First of all: a full disk must be met before there is a daemon that nobody would know of.
    _write_file(f"{bundle}/address", f"unix://{path}")
    if sandbox_id == boot.id:
        listener = _bind(path, boot.socket_dir)
        if listener is not None:
            try:
                _refuse_second_owner(sandbox_id, path)
                _fork_daemon(boot, listener, path)
            except (OSError, ValueError):
                os.unlink(path)
                raise
    elif not is_listening(path):
        raise ValueError(
            f"sandbox {sandbox_id} of container {boot.id} is not running: start its sandbox first"
        )
    _answer(boot, path)


def read_sandbox_id(bundle: str, container_id: str) -> str:
    """The sandbox that the bundle's container belongs to, from the annotations of `config.json`.

    Raises:
        ValueError: `config.json` is missing, unreadable or not JSON.
    """
    try:
        with open(f"{bundle}/config.json", "rb") as file:
            text = file.read()
    except OSError as err:
        raise ValueError(f"cannot read the bundle's {err.filename}: {err.strerror}") from err
    # A lone container, the common case without Kubernetes, has none of the keys: the JSON parser is not needed.
    if not any(key.encode() in text for key, _ in paths.POD_ANNOTATIONS):
        return container_id
    import json

    try:
        annotations = json.loads(text).get("annotations", {})
        sandbox_id = paths.sandbox_of(annotations, container_id)
    except (ValueError, AttributeError, TypeError) as err:
        raise ValueError(f"{bundle}/config.json is not an OCI runtime spec: {err}") from err
    if not isinstance(sandbox_id, str) or not paths.valid_id(sandbox_id):
        raise ValueError(f"{bundle}/config.json names an impossible sandbox id {sandbox_id!r}")
    return sandbox_id


def _bind(path: str, socket_dir: str) -> int | None:
    """A listening socket at `path`; None when a living shim already has it."""
    import _socket

    os.makedirs(socket_dir, mode=0o711, exist_ok=True)
    lock = _lock(socket_dir)
    sock = _socket.socket(_AF_UNIX, _SOCK_STREAM | _SOCK_CLOEXEC)
    old_mask = os.umask(0o177)
    try:
        try:
            sock.bind(path)
        except OSError:
            if not os.path.lexists(path):
                raise
            if is_listening(path):
                sock.close()
                return None
            os.unlink(path)
            sock.bind(path)
        sock.listen(_SOCKET_BACKLOG)
    except OSError as err:
        sock.close()
        raise OSError(f"cannot listen on {path}: {err.strerror or err}") from err
    finally:
        os.umask(old_mask)
        os.close(lock)
    return sock.detach()


def _lock(folder: str) -> int:
    """A lock on the sockets of a folder, until the descriptor is closed: a socket that is bound and does not listen
    yet looks like that of a dead shim, and must not be seen by others."""
    import fcntl

    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def remove_dead_socket(path: str) -> None:
    """Unlink a socket that nobody listens on any more. Harmless when it is not there."""
    try:
        lock = _lock(os.path.dirname(path))
    except FileNotFoundError:
        return
    try:
        if os.path.lexists(path) and not is_listening(path):
            os.unlink(path)
    finally:
        os.close(lock)


def is_listening(path: str) -> bool:
    """Whether somebody accepts connections on the Unix socket."""
    import _socket

    probe = _socket.socket(_AF_UNIX, _SOCK_STREAM | _SOCK_CLOEXEC)
    probe.setblocking(False)
    try:
        probe.connect(path)
    except BlockingIOError:  # the queue of a busy shim is full
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return True


def _refuse_second_owner(sandbox_id: str, socket: str) -> None:
    """State on the host is kept by sandbox id alone, so an id can live only once, whatever its namespace."""
    if not os.path.lexists(paths.run_dir(sandbox_id)):
        return
    from shim import record

    owner = record.read(sandbox_id)
    if owner is not None and owner.daemon_alive():
        raise ValueError(
            f"sandbox {sandbox_id} already runs in namespace {owner.namespace!r} (shim process {owner.pid}): "
            "delete it first or use another id"
        )
    from shim.cleanup import clean_up

    clean_up(sandbox_id, keep_socket=socket)


def _fork_daemon(boot: Bootstrap, listener: int, path: str) -> None:
    sys.stdout.flush()
    if os.fork():
        os.close(listener)
        return
    # containerd reads our answer until every copy of its pipe is closed: let go of them before anything else.
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    # structlog loads rich, where that is installed, to colour a console that a daemon does not have: 40 ms.
    sys.modules["rich"] = None  # type: ignore[assignment]
    code = 1
    try:
        from shim.serve import serve

        code = serve(boot, listener, path)
    except BaseException:
        # Nobody is above us; stderr is containerd's log by now, if there is one.
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _answer(boot: Bootstrap, path: str) -> None:
    address = f"unix://{path}"
    if boot.speaks_protobuf:
        from shim.protowire import bytes_field, int_field

        # BootstrapResult: version, address, protocol. Version 3 is Task v3 and the Sandbox API.
        os.write(1, int_field(1, 3) + bytes_field(2, address) + bytes_field(3, "ttrpc"))
    elif boot.answers_version_3:
        # With anything less containerd would start a shim of its own for each container of the sandbox.
        os.write(1, f'{{"version":3,"address":"{address}","protocol":"ttrpc"}}'.encode())
    else:
        # Every containerd from 1.6 on reads a plain address, and takes it to mean ttRPC and Task v2. Up to 2.2 all of
        # them ask in the same words, and 1.7 refuses version 3: only the Sandbox API tells 2.x from 1.x.
        os.write(1, address.encode())


def _write_file(path: str, text: str) -> None:
    """Write atomically: containerd reads this file when it restarts, and must not see half of it."""
    temporary = f"{path}.{os.getpid()}.tmp"  # other starts of the same pod may do the same at the same time
    with open(temporary, "w") as file:
        file.write(text)
    os.rename(temporary, path)
