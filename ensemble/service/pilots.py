"""Serial mode's way to the tasks: one mpirun of pilots, and the streams to them.

It turns effects into messages and messages into events, and answers for the one question that the
dispatcher cannot: is a pilot that is not heard from still running something? That is so until its
guard says that nothing is left, or until the last beat it can have heard has run out (then its guard
has ended it). Only then are its tasks reported lost, so that no second attempt can overlap.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from ensemble.core.events import (
    CouldNotStart,
    Event,
    Launch,
    NodesGone,
    Pair,
    PilotJoined,
    PilotLost,
    PilotSilent,
    Started,
)
from ensemble.core.model import Node
from ensemble.core.shares import Shares
from ensemble.core.wire import (
    PROTOCOL,
    Beat,
    Bye,
    FromLauncher,
    FromPilot,
    Gone,
    Hello,
    Kill,
    Note,
    Pulse,
    Recall,
    Report,
    Run,
    Work,
)
from ensemble.drivers import linkfile, output, process, roll, sweep
from ensemble.drivers.link import Connection, LinkServer
from ensemble.drivers.roll import Roll
from ensemble.errors import LaunchError, WireError
from ensemble.service import runtime
from ensemble.service.pilotbase import Base, start_mpirun, welcome
from ensemble.service.pilotwords import events_of, work_of

if TYPE_CHECKING:
    from ensemble.log import Logger

#: After the last beat that a pilot can have heard has run out, its guard needs a moment to end it.
KILL_S = 5.0
_BEAT_S = 2.0
#: Tasks in one message; the pilot begins with the first before the last is there.
_BATCH = 128
#: How often a node whose pilot was lost gets another one.
_RESTARTS = 2
_RESTART_S = 1.0
#: A pilot that lived for so long may be restarted as often again.
_STEADY_S = 600.0
#: How long pilots have to leave in good order.
_LEAVE_S = 10.0
#: Instead of the number of a node's launch.
_TO_BE_STARTED = -1
_GIVEN_UP = -2
#: What is shown of an mpirun that failed.
_SHOWN_LINES = 12


@dataclass(slots=True, kw_only=True)
class _Pilot:
    """A node, and the pilot on it."""

    node: Node
    #: The place among the nodes of the allocation.
    index: int
    launch: int = 0
    rank: int = 0
    connection: Connection | None = None
    #: Joined, and not lost since.
    is_up: bool = False
    #: Its connection is lost, its tasks may still run until this moment.
    silent_until: float | None = None
    why_silent: str = ""
    heard: float = 0.0
    beaten: float = 0.0
    is_local: bool = False
    restarts: int = 0
    joined: float = 0.0
    marker_prefix: str = ""
    #: This node with the number of an attempt: one value for all tasks here.
    as_place: dict[int, tuple[_Pilot, int]] = field(default_factory=dict)
    run: list[Work] = field(default_factory=list)
    kill: list[Pair] = field(default_factory=list)
    force: list[Pair] = field(default_factory=list)
    recall: list[Pair] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Launch:
    """One mpirun of pilots."""

    number: int
    pilots: list[_Pilot]
    log: Path
    began: float
    process: process.Process | None = None
    #: Whether it was long enough ago that everybody should be there.
    is_late: bool = False
    #: Whether it was told why its pilots go by their environment.
    is_noted: bool = False


@dataclass(frozen=True, slots=True)
class _Joining:
    """A pilot that gets work as soon as it is on the roll."""

    pilot: _Pilot
    connection: Connection
    event: PilotJoined


class Pilots:
    """The pilots of one launcher."""

    def __init__(
        self,
        nodes: Sequence[Node],
        base: Base,
        *,
        post: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        log: Logger,
    ) -> None:
        """Prepare; `run` starts them."""
        self._base = base
        self._post = post
        self._spawn = spawn
        self._log = log
        self._pilots = [_Pilot(node=node, index=index) for index, node in enumerate(nodes)]
        self._by_name = {each.node.name: each for each in self._pilots}
        self._launches: list[_Launch] = []
        #: Where each task is, and which attempt at it.
        self._of: dict[int, tuple[_Pilot, int]] = {}
        #: Some of these were on nodes that were lost.
        self._has_lost = False
        self._touched: set[int] = set()
        self._is_flushing = False
        self._server = LinkServer(
            on_message=self._on_message, on_lost=self._on_lost, spawn=spawn, log=log
        )
        self._roll: Roll | None = None
        #: Lines for the roll, and who waits for them to be there.
        self._unwritten: list[tuple[str, _Joining | None]] = []
        self._is_writing = False
        self._is_closing = False
        #: When this launcher last went on after it had stood still for longer than pilots bear.
        self._awake_since = 0.0
        self._beat_s = min(_BEAT_S, base.patience_s / 4)
        #: Why not one pilot is left, or ever was.
        self.failure: LaunchError | None = None
        self._failed = asyncio.Event()

    def plan(self) -> Shares:
        """Return the plan that the dispatcher is to go by."""
        return Shares(self._base.slots_per_node)

    # ------------------------------------------------------------------ what the dispatcher wants

    def launch(self, effect: Launch) -> None:
        """Send a task to the pilot of its node."""
        pilot_ = self._by_name[effect.placement.nodes[0].name]
        if pilot_.connection is None:
            return  # it was lost a moment ago, and the dispatcher will hear of it next
        here = (pilot_, effect.claim.attempt)
        self._of[effect.claim.id] = pilot_.as_place.setdefault(effect.claim.attempt, here)
        pilot_.run.append(work_of(effect.claim, self._base.slots_per_node))
        self._touch(pilot_)

    def terminate(self, task_id: int, *, is_forced: bool) -> None:
        """Have a task's tree ended, or the task dropped."""
        if task_id in self._of:  # else it has ended, and its event is on its way
            pilot_, attempt = self._of[task_id]
            (pilot_.force if is_forced else pilot_.kill).append((task_id, attempt))
            self._touch(pilot_)

    def recall(self, pairs: Sequence[Pair]) -> None:
        """Take back what has not started."""
        for pair in pairs:
            pilot_, attempt = self._of.get(pair[0], (None, 0))
            if pilot_ is not None and attempt == pair[1]:
                pilot_.recall.append(pair)
                self._touch(pilot_)

    def _touch(self, pilot_: _Pilot) -> None:
        """Send what has come together once this turn of the loop is over."""
        self._touched.add(pilot_.index)
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        touched, self._touched = self._touched, set()
        for index in touched:
            self._send_all(self._pilots[index])

    def _send_all(self, pilot_: _Pilot) -> None:
        """Send a pilot its messages; to one that is lost, nothing: its tasks are reported lost."""
        messages: list[FromLauncher] = [
            Run(pilot_.run[start : start + _BATCH]) for start in range(0, len(pilot_.run), _BATCH)
        ]
        if pilot_.recall:
            messages.append(Recall(pilot_.recall))
        if pilot_.kill:
            messages.append(Kill(pilot_.kill))
        if pilot_.force:
            messages.append(Kill(pilot_.force, is_forced=True))
        pilot_.run, pilot_.recall, pilot_.kill, pilot_.force = [], [], [], []
        if pilot_.connection is not None:
            self._try_send(pilot_, *messages)

    def _try_send(self, pilot_: _Pilot, *messages: FromLauncher) -> None:
        assert pilot_.connection is not None
        for message in messages:
            try:
                pilot_.connection.send(message)
            except WireError as error:
                self._log.error("pilot.not_sent", node=pilot_.node.name, error=str(error))
                if isinstance(message, Run):
                    self._refuse(pilot_, message, str(error))

    def _refuse(self, pilot_: _Pilot, run: Run, reason: str) -> None:
        """Send a batch that is too long task by task; a task that alone is too long cannot start."""
        assert pilot_.connection is not None
        for work in run.tasks:
            try:
                pilot_.connection.send(Run([work]))
            except WireError:
                now = runtime.utc_now()
                self._of.pop(work.id, None)
                self._post(CouldNotStart(id=work.id, attempt=work.attempt, at=now, reason=reason))

    # ------------------------------------------------------------------ what pilots say

    def _on_message(self, connection: Connection, message: FromPilot) -> None:
        pilot_: _Pilot | None = connection.pilot
        match message:
            case Hello():
                self._join(connection, message)
                return
            case Gone():
                self._gone(message)
                return
            case _:
                pass
        if pilot_ is None:
            raise WireError(f"a {type(message).__name__} came before its Hello")
        pilot_.heard = runtime.boottime_s()
        match message:
            case Report():
                self._take_report(message)
            case Pulse():
                pass
            case Note():
                self._log.warning(message.what, node=pilot_.node.name, text=message.text[:500])
            case _:
                assert_never(message)

    def _take_report(self, report: Report) -> None:
        for event in events_of(report, runtime.utc_now()):
            if not isinstance(event, Started):
                self._of.pop(event.id, None)
            self._post(event)

    def _join(self, connection: Connection, hello: Hello) -> None:
        """Take in a pilot, if it is one that was started."""
        pilot_ = self._find(hello)
        if pilot_ is None or connection.pilot is not None or hello.protocol != PROTOCOL:
            raise WireError(f"no pilot was expected as rank {hello.rank} of launch {hello.launch}")
        if self._is_closing:
            connection.send(Bye())
            return
        launch = self._launches[hello.launch]
        if hello.size != len(launch.pilots):
            self._fail(
                f"mpirun started {hello.size} pilots where {len(launch.pilots)} were asked for; "
                f"its output is in {launch.log}"
            )
            connection.abort()
            return
        connection.identify(pilot_)
        pilot_.connection, pilot_.is_up = connection, True
        pilot_.rank, pilot_.launch = hello.rank, hello.launch
        pilot_.heard = pilot_.joined = runtime.boottime_s()
        pilot_.is_local = pilot_.node.is_virtual or connection.is_local
        pilot_.marker_prefix = f"{self._base.marker_prefix}{hello.launch}-{hello.rank}."
        share = welcome(
            self._base, pilot_.node, hello, (pilot_.index, len(self._pilots)), pilot_.marker_prefix
        )
        self._log.info("pilot.joined", node=pilot_.node.name, host=hello.host, pid=hello.pid)
        if hello.note is not None and not launch.is_noted:
            launch.is_noted = True  # the others would say the same
            self._log.warning("pilot.without_mpi", node=pilot_.node.name, why=hello.note)
        self._try_send(pilot_, share)
        self._beat(pilot_)
        cores = share.cores if self._base.is_pinned else []
        pilot_.node = Node(
            name=pilot_.node.name,
            cores=sum(map(len, share.cores)),
            gpus=len(share.gpus),
            is_virtual=pilot_.node.is_virtual,
        )
        event = PilotJoined(
            node=pilot_.node,
            cores=tuple(tuple(core) for core in cores),
            gpus=tuple(share.gpus),
            memory_mb=share.memory_mb,
        )
        self._put_down(roll.joined(hello.launch, hello.rank), _Joining(pilot_, connection, event))

    def _put_down(self, line: str, joining: _Joining | None = None) -> None:
        """Put a line on the roll, soon; whoever joins gets no work before it is there."""
        self._unwritten.append((line, joining))
        if not self._is_writing:
            self._is_writing = True
            self._spawn(self._write_roll())

    async def _write_roll(self) -> None:
        """Write what has come together; in a thread, as file systems hang."""
        assert self._roll is not None
        while self._unwritten and not self._is_closing:
            lines, self._unwritten = self._unwritten, []
            problem = None
            try:
                await asyncio.to_thread(self._roll.write, [line for line, _ in lines])
            except OSError as error:
                problem = f"cannot write the roll in {self._base.run_directory}: {error.strerror}"
                self._log.error("roll.not_written", error=problem)
            for joining in (each for _, each in lines if each is not None):
                if joining.pilot.connection is not joining.connection:
                    continue  # it was lost meanwhile
                if problem is None:
                    self._post(joining.event)
                else:
                    joining.connection.abort()
        self._is_writing = False

    def _find(self, hello: Hello) -> _Pilot | None:
        """Return the node that a pilot is on: by its host's name, else by its rank in the host list."""
        if not (0 <= hello.launch < len(self._launches)):
            return None
        launched = self._launches[hello.launch].pilots
        if not 0 <= hello.rank < len(launched):
            return None
        found = launched[hello.rank]
        if not found.node.is_virtual:
            here = [each for each in launched if _short(each.node.name) == _short(hello.host)]
            found = here[0] if len(here) == 1 else found
        if found.is_up or found.silent_until is not None:
            found = launched[hello.rank]
        return None if found.is_up or found.silent_until is not None else found

    # ------------------------------------------------------------------ pilots that are lost

    def _on_lost(self, connection: Connection, reason: str) -> None:
        pilot_: _Pilot | None = connection.pilot
        if pilot_ is None or pilot_.connection is not connection:
            return
        pilot_.connection = None
        if self._is_closing:
            return
        # Its guard ends it by the last beat, at the latest; and says so at once where it can. Where
        # this host slept meanwhile, the guard may wake no sooner than we did.
        ended = max(pilot_.beaten + self._base.patience_s, runtime.boottime_s())
        pilot_.silent_until = ended + KILL_S
        pilot_.why_silent = reason
        self._log.warning("pilot.silent", node=pilot_.node.name, reason=reason)
        self._post(PilotSilent(node=pilot_.node.name))
        if pilot_.is_local:
            self._spawn(self._sweep(pilot_))

    async def _sweep(self, pilot_: _Pilot) -> None:
        """End what a pilot on this host left, if its guard was killed, too: here one can look."""
        launch, rank = pilot_.launch, pilot_.rank

        def is_settled() -> bool:
            return pilot_.silent_until is None or (pilot_.launch, pilot_.rank) != (launch, rank)

        await asyncio.sleep(KILL_S / 2)
        if is_settled():
            return
        try:
            swept = await asyncio.to_thread(sweep.sweep_token, pilot_.marker_prefix)
        except (
            OSError
        ) as error:  # for want of file descriptors; its last beat runs out all the same
            self._log.warning("sweep.failed", node=pilot_.node.name, error=str(error))
            return
        if not swept.left and not is_settled():
            self._lost(pilot_, "its pilot is not heard of any more, and nothing of it is left")

    def _gone(self, gone: Gone) -> None:
        """Nothing is left of a pilot: its guard, or what is left of itself, says so."""
        for pilot_ in self._pilots:
            if (pilot_.launch, pilot_.rank) == (gone.launch, gone.rank) and (
                pilot_.is_up or pilot_.silent_until is not None
            ):
                self._lost(pilot_, "its pilot was killed")

    def _lost(self, pilot_: _Pilot, reason: str, *, may_return: bool = True) -> None:
        """Nothing runs on a node any more: what was there is lost."""
        if pilot_.connection is not None:
            pilot_.connection.pilot = None
            pilot_.connection.abort()
            pilot_.connection = None
            self._post(PilotSilent(node=pilot_.node.name))
        if not pilot_.is_up:
            return
        self._put_down(roll.gone(pilot_.launch, pilot_.rank))
        pilot_.is_up, pilot_.silent_until = False, None
        pilot_.run, pilot_.recall, pilot_.kill, pilot_.force = [], [], [], []
        self._has_lost = True
        self._log.error("node.lost", node=pilot_.node.name, reason=reason)
        if runtime.boottime_s() - pilot_.joined > _STEADY_S:
            pilot_.restarts = 0
        is_final = not may_return or pilot_.restarts >= _RESTARTS
        name, now = pilot_.node.name, runtime.utc_now()
        reason = f"{name}: {reason}"
        self._post(PilotLost(node=name, at=now, reason=reason, is_final=is_final))
        if is_final or self._is_closing:
            pilot_.launch = _GIVEN_UP
        else:
            self._start_again(pilot_)
        self._look_for_any()

    def _start_again(self, pilot_: _Pilot) -> None:
        pilot_.restarts += 1
        pilot_.launch = _TO_BE_STARTED
        self._spawn(self._restart_soon())

    async def _restart_soon(self) -> None:
        """Start one mpirun for all nodes that lost their pilots in this moment."""
        await asyncio.sleep(_RESTART_S)
        waiting = [each for each in self._pilots if each.launch == _TO_BE_STARTED]
        if waiting and not self._is_closing:
            self._log.info("pilots.restarted", nodes=[each.node.name for each in waiting])
            await self._start(waiting)

    def _look_for_any(self) -> None:
        """Say so when no pilot is there and none will come."""
        is_any = any(each.is_up or self._is_coming(each) for each in self._pilots)
        if not is_any and not self._is_closing:
            self._fail("no pilot is left: every node's was lost")

    def _is_coming(self, pilot_: _Pilot) -> bool:
        if pilot_.launch == _TO_BE_STARTED or pilot_.silent_until is not None:
            return True
        if pilot_.launch == _GIVEN_UP:
            return False
        launch = self._launches[pilot_.launch]
        return not launch.is_late and (launch.process is None or launch.process.exit is None)

    def _fail(self, message: str) -> None:
        if self.failure is None:
            self.failure = LaunchError(message)
            self._failed.set()

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        """Start the pilots and watch over them until `close`; `failure` says when none is left."""
        try:
            self._open()
        except (LaunchError, OSError) as error:
            self._fail(str(error))
            return
        await self._start(self._pilots)
        while True:
            before = runtime.boottime_s()
            await asyncio.sleep(self._beat_s / 2)
            if runtime.boottime_s() - before > self._base.patience_s / 2:
                self._hear_out()
                continue
            if self._has_lost:  # here, as hundreds of nodes may be lost at once
                self._has_lost = False
                self._of = {id: place for id, place in self._of.items() if place[0].is_up}
            now = runtime.boottime_s()
            for pilot_ in self._pilots:
                self._look_at(pilot_, now)
            for launch in self._launches:
                if not launch.is_late and now - launch.began > self._base.join_s:
                    launch.is_late = True
                    self._miss(launch, f"did not join within {self._base.join_s:g} s")

    async def failed(self) -> LaunchError:
        """Wait until there is no pilot, and none will come; return why."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    def _hear_out(self) -> None:
        """Listen first: it was we who stood still (stopped, or asleep), so what was said is still to be read."""
        self._awake_since = now = runtime.boottime_s()
        self._log.warning("launcher.stood_still", hint="pilots may have been ended meanwhile")
        for pilot_ in self._pilots:
            pilot_.heard = now
            if pilot_.silent_until is not None:
                pilot_.silent_until = max(pilot_.silent_until, now + KILL_S)

    def _look_at(self, pilot_: _Pilot, now: float) -> None:
        if pilot_.connection is not None:
            if now - pilot_.heard > self._base.patience_s:
                self._log.warning("pilot.unheard", node=pilot_.node.name)
                pilot_.connection.abort()
            elif now - pilot_.beaten >= self._beat_s:
                self._beat(pilot_)
        elif pilot_.silent_until is not None and now > pilot_.silent_until:
            # Not one word from it: the node is dead, or its network is, and nobody is sent there
            # again; or nobody was there to hear it.
            was_heard = pilot_.beaten > self._awake_since
            self._lost(pilot_, pilot_.why_silent, may_return=not was_heard)

    def _beat(self, pilot_: _Pilot) -> None:
        pilot_.beaten = runtime.boottime_s()
        self._try_send(pilot_, Beat(at=pilot_.beaten, lives_s=self._base.patience_s))

    def _open(self) -> None:
        """Listen, and write down where."""
        is_virtual = all(each.node.is_virtual for each in self._pilots)
        port = self._server.open("127.0.0.1" if is_virtual else None)
        addresses = ("127.0.0.1",) if is_virtual else linkfile.addresses_of_this_host()
        link = linkfile.make(addresses, port, len(self._pilots), launcher_id=self._base.launcher_id)
        self._server.context = link.server_context()
        self._roll = Roll(self._base.run_directory, self._base.marker_prefix)
        link.write(self._base.link_path)

    async def _start(self, pilots: Sequence[_Pilot]) -> None:
        """Start one mpirun for these nodes."""
        number = len(self._launches)
        log = self._base.run_directory / f"pilots-{number}.log"
        launch = _Launch(number=number, pilots=list(pilots), log=log, began=runtime.boottime_s())
        self._launches.append(launch)
        for rank, pilot_ in enumerate(pilots):
            pilot_.launch, pilot_.rank = number, rank
        try:
            launch.process = await asyncio.to_thread(
                start_mpirun, self._base, number, [each.node for each in pilots], log
            )
        except LaunchError as error:
            self._miss(launch, str(error))
            return
        self._spawn(self._watch(launch))

    async def _watch(self, launch: _Launch) -> None:
        """Wait for an mpirun's end: pilots that are there live on without it."""
        assert launch.process is not None
        result = await launch.process.wait()
        if not self._is_closing:
            self._log.warning("mpirun.ended", launch=launch.number, status=result.status)
            why = f"{self._base.mpi.command[0]} ended with status {result.status}"
            # Where one pilot came, the others were hit on their way: by a network that reset them all, say.
            self._miss(launch, why, may_return=any(each.joined for each in self._pilots))

    def _miss(self, launch: _Launch, reason: str, *, may_return: bool = False) -> None:
        """Give up waiting for the pilots of a launch that are not there."""
        missing = [
            each
            for each in launch.pilots
            if each.launch == launch.number and not each.is_up and each.silent_until is None
        ]
        if not missing:
            return
        given_up = []
        for pilot_ in missing:
            if may_return and pilot_.restarts < _RESTARTS:
                self._start_again(pilot_)
            else:
                pilot_.launch = _GIVEN_UP
                given_up.append(pilot_.node.name)
        said = output.tail(launch.log, _SHOWN_LINES)
        if not any(each.joined for each in self._pilots):
            text = f"no pilot joined: {reason}"
            self._fail(f"{text}; it said:\n{said}" if said else f"{text} (log: {launch.log})")
            return
        names = [each.node.name for each in missing]
        self._log.error("pilots.missing", nodes=names, reason=reason, said=said[-500:])
        if given_up:
            self._post(NodesGone(names=tuple(given_up), reason=f"no pilot joined: {reason}"))
        self._look_for_any()

    async def close(self) -> None:
        """Let the pilots go, end what does not, and take the link and the roll away."""
        self._is_closing = True
        for pilot_ in self._pilots:
            if pilot_.connection is not None:
                self._try_send(pilot_, Bye())
        for launch in self._launches:
            if launch.process is None:
                continue
            is_any = any(each.is_up and each.launch == launch.number for each in launch.pilots)
            leave_s = _LEAVE_S if is_any or not launch.is_late else 0.0
            try:
                async with asyncio.timeout(leave_s):
                    await launch.process.wait()
            except TimeoutError:
                self._log.warning("mpirun.did_not_end", launch=launch.number)
            await process.end_tree(launch.process, grace_s=0)
        self._server.close()
        with contextlib.suppress(OSError):  # the site's file system may be away
            self._base.link_path.unlink(missing_ok=True)
        if self._roll is not None:
            roll.remove(self._base.run_directory)


def _short(name: str) -> str:
    return name.partition(".")[0].lower()
