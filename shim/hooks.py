"""The OCI hooks of a container that belong to the host (runtime-spec: config.md, "POSIX-platform Hooks").

The network of containers without CNI is made by such hooks, Docker's and nerdctl's among them: they find it by the
process id in the state that they are given. That is QEMU's here, which lives in the pod's network namespace.

A hook sees the host as it is, not as the shim does, with the shim's own mounts. Those that come before the container
decide whether there is one; of those that come after it, a failure is a line in the log.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec
import structlog

from hypervisor.errors import HypervisorError
from hypervisor.process import spawned
from shim.errors import HookFailed, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Literal, TypeAlias

    from shim.bundle import Bundle, Hook

    Status: TypeAlias = Literal["creating", "created", "running", "stopped"]

log = structlog.get_logger()

# Of hooks that set none themselves. containerd waits for Create as long as its own caller does, which may be for ever.
_LIMIT_S = 120


class HostHooks:
    """The hooks of one container. `pid` is the virtual machine's, `mounts` a descriptor of the host's mount namespace
    (None where the shim has no other). Raises InvalidRequest for a hook that cannot be one."""

    def __init__(self, bundle: Bundle, pid: int, mounts: int | None) -> None:
        self._bundle = bundle
        self._hooks = bundle.spec.hooks
        self._pid = pid
        self._mounts = mounts
        self._begun = False
        for hook in self._all():
            if not hook.path.startswith("/"):
                raise InvalidRequest(f"{self._what}: hook {hook.path!r}: want an absolute path")

    async def prepare(self) -> bool:
        """Run `prestart` and `createRuntime`; returns whether there were any. Raises HookFailed."""
        hooks = (*self._hooks.prestart, *self._hooks.create_runtime)
        self._begun = self._begun or bool(hooks)
        await self._run("prestart", self._hooks.prestart, "creating")
        await self._run("createRuntime", self._hooks.create_runtime, "creating")
        return bool(hooks)

    async def create(self, netns: Path | None) -> None:
        """Run `createContainer`, in the pod's network namespace. Raises HookFailed."""
        self._begun = self._begun or bool(self._hooks.create_container)
        await self._run("createContainer", self._hooks.create_container, "creating", netns)

    async def started(self) -> None:
        """Run `poststart`."""
        await self._run_all("poststart", self._hooks.poststart, "running")

    async def stopped(self) -> None:
        """Run `poststop`, if there has been anything to undo."""
        if self._begun or self._hooks.poststop:
            await self._run_all("poststop", self._hooks.poststop, "stopped")

    @property
    def _what(self) -> str:
        return f"container {self._bundle.container_id}"

    def _all(self) -> Iterable[Hook]:
        hooks = self._hooks
        return (
            *hooks.prestart,
            *hooks.create_runtime,
            *hooks.create_container,
            *hooks.poststart,
            *hooks.poststop,
        )

    async def _run(self, kind: str, hooks: Iterable[Hook], status: Status, netns: Path | None = None) -> None:
        for hook in hooks:
            await self._run_one(f"{kind} hook {hook.path} of {self._what}", hook, status, netns)

    async def _run_all(self, kind: str, hooks: Iterable[Hook], status: Status) -> None:
        for hook in hooks:
            try:
                await self._run(kind, (hook,), status)
            except HookFailed as err:
                log.warning("hook_failed", reason=str(err))

    async def _run_one(self, what: str, hook: Hook, status: Status, netns: Path | None) -> None:
        limit_s = hook.timeout if hook.timeout and hook.timeout > 0 else _LIMIT_S
        pairs = (entry.partition("=") for entry in hook.env or ())
        with ExitStack() as undo:
            state = os.memfd_create("state", os.MFD_CLOEXEC)
            undo.callback(os.close, state)
            os.write(state, self._state(status))
            os.lseek(state, 0, os.SEEK_SET)
            try:
                async with (
                    spawned(
                        hook.args or [hook.path],
                        program=hook.path,
                        stdin=state,
                        environment={name: value for name, _, value in pairs},
                        mounts=self._mounts,
                        netns=netns,
                    ) as process,
                    asyncio.timeout(limit_s),
                ):
                    end = await process.wait()
            except TimeoutError as err:
                raise HookFailed(f"{what} has not ended after {limit_s} s; it was killed") from err
            except (HypervisorError, OSError) as err:
                raise HookFailed(f"{what}: {err}") from err
        if end.status != 0:
            words = " | ".join(process.output_tail()) or "it said nothing"
            raise HookFailed(f"{what} failed: {end}: {words}")

    def _state(self, status: Status) -> bytes:
        """The state as runtime-spec's runtime.md has it; a container that has stopped has no process."""
        version = self._bundle.raw.get("ociVersion")
        return msgspec.json.encode(
            {
                "ociVersion": version if isinstance(version, str) else "1.0.2",
                "id": self._bundle.container_id,
                "status": status,
                "pid": 0 if status == "stopped" else self._pid,
                "bundle": str(self._bundle.path),
                "annotations": self._bundle.spec.annotations,
            }
        )
