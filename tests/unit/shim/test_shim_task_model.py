"""Containers against a model of runc's shim: any verbs in any order, with exits and refusals of the agent in between.

The first machine predicts every answer. The second lets calls overtake each other, with an agent that holds some of
them back; there only what must hold in any order is checked: no call hangs, no event comes too early, late or twice.
Every pair of calls that can meet is in test_shim_task_races.py.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support import event_order
from tests.support.stub_guest import World
from ttrpc import Code

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")
CONTAINERS, EXECS = st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])
ANY = st.sampled_from(["", "x", "y"])
OK, GONE, WRONG, REFUSED = Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.INTERNAL
NUMBERS = {"created": 1, "running": 2, "stopped": 3, "paused": 4}
PLAIN = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class InLoop(RuleBasedStateMachine):
    """A machine with an event loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.world = self.run(self._world())

    async def _world(self) -> World:
        """A world in which a container runs, with an exec that runs and one that could."""
        world = World()
        world.create("a")
        await world.call("Start", id="a")
        for exec_id in ("x", "y"):
            await world.call("Exec", id="a", exec_id=exec_id)
        await world.call("Start", id="a", exec_id="x")
        await world.settle()
        return world

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @invariant()
    def events_are_in_order(self) -> None:
        for container_id in ("a", "b"):
            for life in lives(self.world.publisher.told(container_id)):
                event_order.check(life)

    def teardown(self) -> None:
        self.runner.close()


def lives(told: list[str]) -> list[list[str]]:
    """The events of one container id, split where a new container took the id of a deleted one."""
    starts = [number for number, word in enumerate(told) if word == "create"]
    return [told[start:end] for start, end in pairwise([*starts, len(told)])]


class TaskRules(InLoop):
    """One call at a time, every answer predicted."""

    def __init__(self) -> None:
        super().__init__()
        # Of the containers that exist: the state of each process; the init's name is "".
        self.model = {"a": {"": "running", "x": "running", "y": "created"}}
        self.waiting: list[tuple[str, str, asyncio.Task[Code]]] = []

    def expect(self, expected: Code, method: str, container_id: str, **fields: Any) -> None:
        async def work() -> Code:
            code = await self.world.code(method, id=container_id, **fields)
            await self.world.settle()
            return code

        assert self.run(work()) is expected

    def state(self, container_id: str, exec_id: str = "") -> str:
        return self.model.get(container_id, {}).get(exec_id, "gone")

    def all_stop(self, container_id: str) -> None:
        processes = self.model[container_id]
        processes[""] = "stopped"
        for exec_id, state in processes.items():
            if state == "running":
                processes[exec_id] = "stopped"

    @rule(container_id=CONTAINERS)
    def create(self, container_id: str) -> None:
        async def work() -> None:
            self.world.create(container_id)

        if container_id not in self.model:
            self.run(work())
            self.model[container_id] = {"": "created"}

    @rule(container_id=CONTAINERS, refused=st.booleans())
    def start(self, container_id: str, refused: bool) -> None:
        state = self.state(container_id)
        if state != "created":
            return self.expect(GONE if state == "gone" else WRONG, "Start", container_id)
        if refused:
            self.world.agent.refuse("start_container")
            self.expect(REFUSED, "Start", container_id)
            return self.all_stop(container_id)  # an init that cannot be started is killed
        self.expect(OK, "Start", container_id)
        self.model[container_id][""] = "running"
        return None

    @rule(container_id=CONTAINERS, exec_id=EXECS)
    def add_exec(self, container_id: str, exec_id: str) -> None:
        state = self.state(container_id)
        if state == "gone":
            return self.expect(GONE, "Exec", container_id, exec_id=exec_id)
        if exec_id in self.model[container_id]:
            return self.expect(Code.ALREADY_EXISTS, "Exec", container_id, exec_id=exec_id)
        allowed = state in ("created", "running")
        self.expect(OK if allowed else WRONG, "Exec", container_id, exec_id=exec_id)
        if allowed:
            self.model[container_id][exec_id] = "created"
        return None

    @rule(container_id=CONTAINERS, exec_id=EXECS, refused=st.booleans())
    def start_exec(self, container_id: str, exec_id: str, refused: bool) -> None:
        state = self.state(container_id, exec_id)
        if state == "gone":
            return self.expect(GONE, "Start", container_id, exec_id=exec_id)
        if state != "created" or self.state(container_id) not in ("created", "running"):
            return self.expect(WRONG, "Start", container_id, exec_id=exec_id)
        if refused:
            self.world.agent.refuse("exec_process")
        self.expect(REFUSED if refused else OK, "Start", container_id, exec_id=exec_id)
        self.model[container_id][exec_id] = "stopped" if refused else "running"
        return None

    @rule(container_id=CONTAINERS, exec_id=ANY, number=st.sampled_from([15, 9]), to_all=st.booleans())
    def kill(self, container_id: str, exec_id: str, number: int, to_all: bool) -> None:
        state = self.state(container_id, exec_id)
        if state in ("gone", "stopped"):
            expected = GONE
        elif exec_id and state == "created":
            expected = WRONG
        else:
            expected = OK
        self.expect(expected, "Kill", container_id, exec_id=exec_id, signal=number, all=to_all)
        if expected is OK and number == 9:
            if exec_id:
                self.model[container_id][exec_id] = "stopped"
            else:
                self.all_stop(container_id)

    @rule(container_id=CONTAINERS, exec_id=ANY, status=st.integers(0, 255))
    def end(self, container_id: str, exec_id: str, status: int) -> None:
        if self.state(container_id, exec_id) not in ("running",) and (
            exec_id or self.state(container_id) in ("gone", "stopped")
        ):
            return

        async def work() -> None:
            self.world.agent.end(container_id, exec_id, status)
            await self.world.settle()

        self.run(work())
        if exec_id:
            self.model[container_id][exec_id] = "stopped"
        else:
            self.all_stop(container_id)

    @rule(container_id=CONTAINERS, refused=st.booleans(), resume=st.booleans())
    def pause_or_resume(self, container_id: str, refused: bool, resume: bool) -> None:
        verb, needed, then = ("Resume", "paused", "running") if resume else ("Pause", "running", "paused")
        state = self.state(container_id)
        if state != needed:
            return self.expect(GONE if state == "gone" else WRONG, verb, container_id)
        if refused:
            self.world.agent.refuse(f"{verb.lower()}_container")
            return self.expect(REFUSED, verb, container_id)
        self.expect(OK, verb, container_id)
        self.model[container_id][""] = then
        return None

    @rule(container_id=CONTAINERS, exec_id=ANY)
    def delete(self, container_id: str, exec_id: str) -> None:
        state = self.state(container_id, exec_id)
        expected = GONE if state == "gone" else OK if state in ("created", "stopped") else WRONG
        self.expect(expected, "Delete", container_id, exec_id=exec_id)
        if expected is OK:
            if exec_id:
                del self.model[container_id][exec_id]
            else:
                del self.model[container_id]

    @rule(container_id=CONTAINERS)
    def update(self, container_id: str) -> None:
        state = self.state(container_id)
        expected = GONE if state == "gone" else WRONG if state == "stopped" else OK
        self.expect(expected, "Update", container_id, resources={"value": b"{}"})

    @rule(container_id=CONTAINERS, method=st.sampled_from(["Stats", "Pids"]))
    def look(self, container_id: str, method: str) -> None:
        self.expect(GONE if self.state(container_id) == "gone" else OK, method, container_id)

    @rule(container_id=CONTAINERS)
    def out_of_memory(self, container_id: str) -> None:
        if self.state(container_id) in ("created", "running", "paused"):
            self.world.container(container_id).out_of_memory()

    @rule(container_id=CONTAINERS, exec_id=ANY)
    def wait(self, container_id: str, exec_id: str) -> None:
        async def work() -> asyncio.Task[Code]:
            task = asyncio.create_task(self.world.code("Wait", id=container_id, exec_id=exec_id))
            await self.world.settle()
            return task

        task = self.run(work())
        if self.state(container_id, exec_id) == "gone":
            assert task.result() is GONE
        else:
            self.waiting.append((container_id, exec_id, task))

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        for container_id, processes in self.model.items():
            for exec_id, state in processes.items():
                if state == "running" and processes[""] == "paused":
                    state = "paused"
                reply = self.run(self.world.call("State", id=container_id, exec_id=exec_id))
                assert (container_id, exec_id, reply.status) == (container_id, exec_id, NUMBERS[state])

    @invariant()
    def waits_return_at_the_end(self) -> None:
        left = []
        for container_id, exec_id, task in self.waiting:
            if self.state(container_id, exec_id) in ("gone", "stopped"):
                assert task.result() is OK
            else:
                left.append((container_id, exec_id, task))
        self.waiting = left


METHODS = (
    "start_container", "exec_process", "pause_container", "resume_container", "update_container", "stats_container",
    "remove_container", "signal_process", "signal_container", "wait_process", "list_processes", "get_guest_details",
)  # fmt: skip
VERBS = st.sampled_from(
    [
        "State",
        "Start",
        "Delete",
        "Pids",
        "Pause",
        "Resume",
        "Kill",
        "Exec",
        "Update",
        "Wait",
        "Stats",
        "ResizePty",
    ]
)
ANSWERS = {OK, GONE, WRONG, REFUSED, Code.ALREADY_EXISTS, Code.UNAVAILABLE}


class TaskRaces(InLoop):
    """Any number of calls at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[asyncio.Event] = []
        self.calls: list[tuple[str, asyncio.Task[Code]]] = []
        self.machine_ended = False

    @rule(container_id=CONTAINERS)
    def create(self, container_id: str) -> None:
        async def work() -> None:
            self.world.create(container_id)
            await self.world.settle()

        if container_id not in self.world.containers and not self.machine_ended:
            self.run(work())

    @rule(
        container_id=CONTAINERS, method=VERBS, exec_id=ANY, number=st.sampled_from([15, 9]), to_all=st.booleans(),
        turns=st.integers(0, 8),
    )  # fmt: skip
    def call(
        self, container_id: str, method: str, exec_id: str, number: int, to_all: bool, turns: int
    ) -> None:
        fields: dict[str, Any] = {"id": container_id}
        if method in ("State", "Start", "Delete", "Kill", "Exec", "Wait", "ResizePty"):
            fields["exec_id"] = exec_id or ("x" if method == "Exec" else "")
        if method == "Kill":
            fields |= {"signal": number, "all": to_all}
        if method == "Update":
            fields["resources"] = {"value": b"{}"}

        async def work() -> asyncio.Task[Code]:
            task = asyncio.create_task(self.world.code(method, **fields))
            for _ in range(turns):
                await asyncio.sleep(0)
            return task

        self.calls.append((method, self.run(work())))

    @rule(method=st.sampled_from(METHODS))
    def hold(self, method: str) -> None:
        self.held.append(self.world.agent.hold(method))

    @rule(method=st.sampled_from(METHODS))
    def refuse(self, method: str) -> None:
        self.world.agent.refuse(method)

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.held.pop(0).set()
        self.run(self.world.settle())

    @rule(container_id=CONTAINERS, exec_id=ANY)
    def end(self, container_id: str, exec_id: str) -> None:
        async def work() -> None:
            self.world.agent.end(container_id, exec_id)
            await self.world.settle()

        if (container_id, exec_id) in self.world.agent.ended:
            self.run(work())

    @rule(container_id=CONTAINERS)
    def out_of_memory(self, container_id: str) -> None:
        container = self.world.containers.get(container_id)
        if container and container.init.state.name != "STOPPED":
            container.out_of_memory()

    @rule(index=st.integers(0, 50))
    def caller_leaves(self, index: int) -> None:
        if index < len(self.calls):
            self.calls.pop(index)[1].cancel()

    @precondition(lambda self: len(self.calls) > 10)
    @rule()
    def machine_ends(self) -> None:
        self.run(self.world.end_machine())
        self.machine_ended = True

    def teardown(self) -> None:
        self.run(self._finish())
        self.events_are_in_order()
        super().teardown()

    async def _finish(self) -> None:
        """Whatever happened: everything can be ended, and then everybody has an answer."""
        for event in self.held:
            event.set()
        await self.world.settle()
        for container in list(self.world.containers.values()):
            await self.world.code("Kill", id=container.id, signal=9)
            await self.world.settle()
            for container_id, exec_id in list(self.world.agent.ended):
                self.world.agent.end(container_id, exec_id)
            await self.world.settle()
            if container.id in self.world.containers:
                assert await self.world.code("Delete", id=container.id) in (OK, GONE)
        await self.world.settle()
        for method, task in self.calls:
            assert task.done(), f"{method} hangs"
            assert task.result() in ANSWERS, (method, task.result())


TestTaskRules = TaskRules.TestCase
TestTaskRules.settings = PLAIN
TestTaskRaces = TaskRaces.TestCase
TestTaskRaces.settings = PLAIN
