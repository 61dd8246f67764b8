"""Ends the job if a rank dies or stalls, and names that rank.

If a rank stalls, all others wait in a collective, which cannot say why. Each rank therefore has a thread that checks
the rank's main thread about once a second and reports to rank 0's thread over a separate TCP connection. Rank 0's
thread decides. All ranks run the same program, so the others wait for the rank whose main thread has made the fewest
calls of ``beat``. Only the standstill of that rank is a fault, however long the others wait.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dico_t2i.command import HANG_EXIT_CODE
from dico_t2i.training.ranks.distributed import World

LONGEST_INTERVAL_S = 1.0

_LEAVE_S = 2.0  # for a rank to print its last message
_SETTLE = 4  # intervals from the first failure to the verdict, since the death of one rank makes others fail
_UNHEARD = 3  # intervals without a message after which a rank counts as stopped
_DONE = ""
_MAX_LINE = 1 << 16
_MAX_NAMED = 4


@dataclass(frozen=True)
class Progress:
    """The progress of a rank's main thread."""

    rank: int
    host: str = "an unknown host"
    pid: int = 0
    beats: int = 0
    step: int = 0
    phase: str = "start"
    idle_s: float = 0.0  # time since the last beat
    limit_s: float = 0.0  # the limit of idle_s
    children: str = ""  # child processes that do not run, such as a stopped data worker; searched for when idle
    end: str | None = None  # why the rank has ended: "" if its work is done, else an error


@dataclass(frozen=True)
class Verdict:
    """Which ranks are at fault, at which step, and a description."""

    ranks: Sequence[int]
    step: int
    text: str


class Watchdog:
    """Watches the code inside its context. Every rank creates one at the same place; collective.

    If a rank makes no progress for ``timeout_s`` seconds (until the second step: ``first_timeout_s``), dies, or leaves
    the context by an exception, every other rank prints which rank it was and where, prints the stack of its own main
    thread, calls ``on_verdict(step, message)`` and exits with code 74. A rank that raised continues with its own
    exception once the others have been told.
    """

    def __init__(
        self,
        world: World,
        timeout_s: float,
        first_timeout_s: float,
        on_verdict: Callable[[int, str], None] | None = None,
    ) -> None:
        self.world, self.timeout_s, self.first_timeout_s = world, timeout_s, max(first_timeout_s, timeout_s)
        self.on_verdict = on_verdict
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / 10)
        self._first_step: int | None = None
        self._state = (0, 0, "start", self.first_timeout_s)  # beats, step, phase, limit; replaced together
        self._end: str | None = None
        self._changed, self._settled = threading.Event(), threading.Event()
        self._watch: _Judge | _Witness = self._join() if world.size > 1 else _Judge(world.size, None, 0)
        # Otherwise data workers would keep a dead rank's connection open.
        os.register_at_fork(after_in_child=self._watch.close)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str, extra_s: float = 0.0) -> None:
        """Report that the main thread begins a phase of a step, which may take ``extra_s`` longer than usual.

        All ranks make the same calls in the same order.
        """
        if self._first_step is None:
            self._first_step = step
        limit = self.first_timeout_s if step == self._first_step else self.timeout_s
        self._state = self._state[0] + 1, step, phase, limit + extra_s

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = _DONE if kind is None else f"{kind.__name__}: {error}"[:1000]
        self._changed.set()
        if kind is None:
            self._thread.join()
        else:
            self._settled.wait(3 * _SETTLE * self.interval_s)
            # The work after the exception (joining workers, aborting collectives) can hang as well.
            faulthandler.dump_traceback_later(max(self.timeout_s, 10 * LONGEST_INTERVAL_S), exit=True)
            self._settled.set()
            self._thread.join()
        self._watch.close()

    def _join(self) -> _Judge | _Witness:
        """Send rank 0's address to all ranks and connect. Raises ConnectionError if rank 0 cannot be reached."""
        listener = _listen(self.world.size) if self.world.is_main else None
        address = [listener.getsockname()[1], secrets.randbits(62)] if listener else [0, 0]
        shared = torch.tensor(address, device=self.world.device)
        dist.broadcast(shared, 0)
        port, token = shared.tolist()
        if listener:
            return _Judge(self.world.size, listener, token)
        host = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((host, port), timeout=60)
        except OSError as error:
            raise ConnectionError(
                f"rank {self.world.rank} on {socket.gethostname()} cannot reach rank 0 at {host}, port {port}: {error};"
                " the nodes of a job need open TCP ports between them, and MASTER_ADDR must be rank 0's node"
            ) from None
        return _Witness(_Link(connection), token, self.first_timeout_s)

    def _run(self) -> None:
        seen, idle, last = -1, 0.0, time.monotonic()
        while not self._settled.is_set():
            now = time.monotonic()
            # A longer time means that the whole process was stopped, main thread included, so it proves nothing.
            elapsed, last = min(now - last, 2 * self.interval_s), now
            beats, step, phase, limit = self._state
            idle = idle + elapsed if beats == seen else 0.0
            seen = beats
            host, end = socket.gethostname(), self._end
            children = _stuck_children() if idle > limit / 2 else ""
            own = Progress(self.world.rank, host, os.getpid(), beats, step, phase, idle, limit, children, end)
            verdict = self._watch.exchange(own, elapsed, self.interval_s)
            if verdict:
                self._act(verdict, own)
                return
            if end == _DONE and self._watch.may_leave:
                return
            self._changed.wait(self.interval_s)
            self._changed.clear()

    def _act(self, verdict: Verdict, own: Progress) -> None:
        self._watch.spread(verdict, own, self.interval_s)
        if self._end is not None and self.world.rank in verdict.ranks:
            self._settled.set()  # the main thread shows its own error
            return
        leave = threading.Timer(_LEAVE_S, os._exit, (HANG_EXIT_CODE,))  # in case printing blocks on a pipe or file
        leave.daemon = True
        leave.start()
        print(
            f"[hang] rank {self.world.rank}: {verdict.text}; its own main thread is at:",
            file=sys.stderr,
            flush=True,
        )
        traceback.print_stack(sys._current_frames().get(threading.main_thread().ident or 0), file=sys.stderr)
        if self.on_verdict:
            self.on_verdict(verdict.step, verdict.text)
        sys.stderr.flush()
        os._exit(HANG_EXIT_CODE)


class _Link:
    """Sends and receives JSON objects, one per line, over a connection; never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self.closed = connection, False
        self._received, self._unsent = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; it is dropped if the peer has not received the one before."""
        self._unsent = self._unsent or json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def newest(self) -> dict[str, Any] | None:
        """The newest message since the last call, or None."""
        try:
            while len(self._received) < _MAX_LINE and (data := self.connection.recv(_MAX_LINE)):
                self._received += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._received = self._received.split(b"\n")
        try:
            message = json.loads(lines[-1]) if lines else None
        except ValueError:
            message = None
        return message if isinstance(message, dict) else None


@dataclass
class Seat:
    """The state of a rank as rank 0 knows it."""

    progress: Progress
    link: _Link | None = None
    silent_s: float = 0.0  # time since its last message

    @property
    def idle_s(self) -> float:
        return self.progress.idle_s + self.silent_s

    @property
    def died(self) -> bool:
        return self.link is not None and self.link.closed and self.progress.end is None


class _Judge:
    """The watchdog of rank 0: receives messages from all ranks and finds which are at fault."""

    def __init__(self, size: int, listener: socket.socket | None, token: int) -> None:
        self.seats = [Seat(Progress(rank)) for rank in range(size)]
        self.listener, self.token = listener, token
        self._strangers: list[_Link] = []
        self._bad_news_s = 0.0
        self._fewest, self._standstill_s = 0, 0.0  # beats of the slowest rank, and time since they last changed

    @property
    def may_leave(self) -> bool:
        """Whether no rank needs rank 0 any more."""
        return all(seat.progress.end == _DONE for seat in self.seats[1:])

    def exchange(self, own: Progress, elapsed: float, interval_s: float) -> Verdict | None:
        self.seats[0].progress = own
        self._welcome()
        for seat in self.seats[1:]:
            message = seat.link.newest() if seat.link else None
            seat.silent_s = 0.0 if message else seat.silent_s + elapsed
            if message:
                seat.progress = _progress(message)
            elif not seat.link:
                seat.progress = Progress(seat.progress.rank, limit_s=own.limit_s)
            if seat.link:
                seat.link.send({"main": asdict(own)})
        broken = any(seat.died or seat.progress.end for seat in self.seats)
        self._bad_news_s = self._bad_news_s + elapsed if broken else 0.0
        settled = self._bad_news_s > _SETTLE * interval_s or len(self.seats) == 1
        fewest = min((seat.progress.beats for seat in _running(self.seats)), default=0)
        self._standstill_s = self._standstill_s + elapsed if fewest == self._fewest else 0.0
        self._fewest = fewest
        return judge(self.seats, interval_s, settled, self._standstill_s)

    def spread(self, verdict: Verdict, own: Progress, interval_s: float) -> None:
        """Send the verdict to all ranks, twice, since a message may be dropped, and wait until they receive it."""
        for _ in range(2 if len(self.seats) > 1 else 0):
            for seat in self.seats[1:]:
                if seat.link:
                    seat.link.send({"main": asdict(own), "verdict": asdict(verdict)})
            time.sleep(interval_s)

    def close(self) -> None:
        links = [seat.link for seat in self.seats if seat.link] + self._strangers
        for connection in [link.connection for link in links] + ([self.listener] if self.listener else []):
            connection.close()

    def _welcome(self) -> None:
        """Accept connections of ranks that send the right token."""
        while self.listener:
            try:
                self._strangers.append(_Link(self.listener.accept()[0]))
            except OSError:
                break
        for link in list(self._strangers):
            message = link.newest()
            if message or link.closed:
                self._strangers.remove(link)
                if message and message.get("token") == self.token:
                    progress = _progress(message)
                    self.seats[progress.rank] = Seat(progress, link)


class _Witness:
    """The watchdog of the other ranks: reports to rank 0 and receives the verdict."""

    may_leave = True

    def __init__(self, link: _Link, token: int, first_timeout_s: float) -> None:
        self.link, self.token = link, token
        self.main = Seat(Progress(0, limit_s=first_timeout_s), link)

    def exchange(self, own: Progress, elapsed: float, interval_s: float) -> Verdict | None:
        self.link.send({**asdict(own), "token": self.token})
        message = self.link.newest()
        self.main.silent_s = 0.0 if message else self.main.silent_s + elapsed
        if message:
            self.main.progress = _progress(message["main"])
            if "verdict" in message:
                return Verdict(**message["verdict"])
        if own.end == _DONE:
            return None
        if self.link.closed:
            return _verdict([self.main], _failure if self.main.progress.end else _death)
        return _verdict([self.main], _silence) if self.main.silent_s > self.main.progress.limit_s else None

    def spread(self, verdict: Verdict, own: Progress, interval_s: float) -> None:
        """Do nothing, since only rank 0 sends the verdict."""

    def close(self) -> None:
        self.link.connection.close()


def judge(
    seats: Sequence[Seat], interval_s: float, settled: bool, standstill_s: float = float("inf")
) -> Verdict | None:
    """The ranks that are at fault, or None.

    settled: whether the first failure (a death or an exception) is so old that those of other ranks have arrived, too.
    standstill_s: time since the slowest rank's last beat. When that rank arrives in a collective, the others have been
    idle for as long as it was slow, but none of them is at fault.
    """
    running = _running(seats)
    dead = [seat for seat in running if seat.died]
    failed = [seat for seat in running if seat.progress.end]
    unheard = [seat for seat in running if seat.silent_s > _UNHEARD * interval_s and not seat.progress.end]
    if dead or failed:
        if not settled:
            return None
        # A rank fails in its next collective after the death of another: deaths explain exceptions, not the reverse.
        if dead:
            return _verdict(dead, _death)
        return _verdict(unheard, _silence) if unheard else _verdict(failed, _failure)
    fewest = min((seat.progress.beats for seat in running), default=0)
    last = [seat for seat in running if seat.progress.beats == fewest]
    stuck = [seat for seat in last if min(seat.idle_s, standstill_s) > seat.progress.limit_s]
    if not stuck:
        return None
    silent = [seat for seat in stuck if seat in unheard]
    waiting = [seat.progress.rank for seat in running if seat not in (silent or stuck)]
    found = _verdict(silent, _silence) if silent else _verdict(stuck, _standstill)
    them = "it" if len(found.ranks) == 1 else "them"
    others = f"; {_ranks(waiting)} for {them}" if waiting else "; no rank makes progress" if len(seats) > 1 else ""
    return Verdict(found.ranks, found.step, found.text + others)


def _running(seats: Sequence[Seat]) -> list[Seat]:
    return [seat for seat in seats if seat.progress.end != _DONE]


def _verdict(guilty: Sequence[Seat], describe: Callable[[Seat], str]) -> Verdict:
    shown = "; ".join(map(describe, guilty[:_MAX_NAMED]))
    more = f"; and {len(guilty) - _MAX_NAMED} more" if len(guilty) > _MAX_NAMED else ""
    return Verdict([seat.progress.rank for seat in guilty], guilty[0].progress.step, shown + more)


def _death(seat: Seat) -> str:
    return f"{_who(seat)} died {_place(seat)}"


def _failure(seat: Seat) -> str:
    return f"{_who(seat)} failed {_place(seat)}: {seat.progress.end}"


def _silence(seat: Seat) -> str:
    return (
        f"{_who(seat)} has sent no message for {seat.silent_s:.0f} s: its process is stopped, or its node cannot be"
        f" reached; its last message came {_place(seat)}"
    )


def _standstill(seat: Seat) -> str:
    return f"{_who(seat)} has been {_place(seat)} for {seat.idle_s:.0f} s{seat.progress.children}"


def _who(seat: Seat) -> str:
    return f"rank {seat.progress.rank} on {seat.progress.host} (pid {seat.progress.pid})"


def _place(seat: Seat) -> str:
    return f"in {seat.progress.phase!r} at step {seat.progress.step}"


_STATES = {"T": "stopped", "D": "waiting for a disk or file system", "Z": "dead"}


def _stuck_children() -> str:
    """ ", its child process 123 is stopped": the child processes that do not run, as text; empty if all run."""
    stuck = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # the process has ended
        if int(parent) == os.getpid() and state in _STATES:
            stuck.append(f", its child process {path.parent.name} is {_STATES[state]}")
    return "".join(stuck[:_MAX_NAMED])


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 2 waits", "ranks 0-2, 5 wait"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"ranks {text} wait" if len(ranks) > 1 else f"rank {text} waits"


def _progress(message: dict[str, Any]) -> Progress:
    return Progress(**{key: message[key] for key in Progress.__dataclass_fields__})


def _listen(backlog: int) -> socket.socket:
    """A socket on a free port, for IPv6 as well if it is available."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=dual)
    listener.setblocking(False)
    return listener
