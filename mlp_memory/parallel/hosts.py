"""The processes of a job: how they find each other, agree, and notice that one is gone.

Every process holds a connection to process 0, from its start to its end: the roll. It is separate
from JAX's own coordination service, because that one cannot say who is missing before all are
there, and ends a process from C++ with a stack trace when another dies (its callback for
this, `missed_heartbeat_callback`, cannot be called from Python in jax 0.10 to 0.12). The roll says it in a
line, names the process and its host, and comes first; JAX's service is the second net.

What goes over the roll are lines of JSON, a few bytes each; an empty line says "alive".
"""

import atexit
import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mlp_memory.artifacts import UserError, first_line
from mlp_memory.parallel.config import HostsConfig
from mlp_memory.parallel.places import Place, find_place

_CONNECT_SECONDS, _RETRY_SECONDS = 2.0, 0.2
_SEND_SECONDS = 10.0
# How long a process whose peer failed may take to come to an end of its own.
_GRACE_SECONDS = 5.0
# An error is often a lost peer's doing, of which the roll hears at about the same time.
_VERDICT_SECONDS = 2.0
_AGAIN = "start the same command on every host again, it goes on from the last checkpoint"


class _Wire:
    """A peer's end of a connection: whole lines in, whole lines out."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.heard, self.left = connection, time.monotonic(), False
        self.process: int | None = None
        self._rest, self._lock = b"", threading.Lock()

    def send(self, message: dict[str, Any] | None) -> None:
        """A message, or None for a sign of life; a peer that is gone is noticed when it is read."""
        data = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(data)

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, once some have; None at the end of the connection."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:
            return None  # none of ours
        return messages if all(isinstance(message, dict) for message in messages) else None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


class Hosts:
    """The job's processes, seen from one of them; `joined` makes it.

    Attributes:
      index: number of this process, 0 to count − 1. Process 0 decides and writes for all.
      count: processes of the job; 1 where this one is alone.
    """

    def __init__(self, place: Place | None, config: HostsConfig):
        self.index, self.count = (0, 1) if place is None else (place.index, place.count)
        self._place, self._config = place, config
        self._names = {} if place is None else dict(place.names)
        self._wires: dict[int, _Wire] = {}
        self._changed = threading.Condition()
        self._agreed: list[Any] = []
        self._leaving, self._started, self._dismissed = False, False, False
        self._port = 0

    def agree(self, value: Any = None) -> Any:
        """Process 0's value, plain JSON, in every process; every process must ask."""
        if self.count == 1:
            return value
        if self.index == 0:
            self._tell_all({"agree": value})
            return value
        with self._changed:
            self._changed.wait_for(lambda: self._agreed)
            return self._agreed.pop(0)

    def start_jax(self) -> None:
        """Joins the processes' devices: `jax.devices()` are then those of all."""
        if self.count == 1:
            return
        import jax

        # Its C++ handler would swallow the SIGTERM that training, or the default action, is to get.
        jax.config.update("jax_enable_preemption_service", False)
        host = self._place.address.rpartition(":")[0]
        limit = int(self._config.heartbeat_timeout)
        jax.distributed.initialize(
            f"{host}:{self._port}",
            self.count,
            self.index,
            local_device_ids=self._place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, int(self._config.start_timeout)),
            heartbeat_timeout_seconds=2 * limit + 10,  # the roll is to speak first
        )
        self._started = True
        # When process 0 dies, C++ aborts at once. Its abort() is held up so that the roll can say who it
        # was: sleep() gets the signal's number, 6, as its seconds, and needs no interpreter.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)

    def call_roll(self) -> None:
        """Waits until every process is there.

        Raises:
          UserError: some did not come in time; it names them.
        """
        deadline = time.monotonic() + self._config.start_timeout
        if self.index == 0:
            self._call(deadline)
        else:
            self._answer(deadline)
        for wire in self._wires.values():
            wire.heard = time.monotonic()
        threading.Thread(target=self._watch, name="roll", daemon=True).start()

    def _call(self, deadline: float) -> None:
        """Process 0: takes the others in, until all are there or the time is up, and tells them which."""
        with self._listen() as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            self._names[0] = socket.gethostname()
            while len(self._wires) < self.count - 1:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    error = self._missing()
                    self._tell_all({"refused": str(error)})
                    raise error
                for key, _ in ready:
                    if key.fileobj is server:
                        wire = _Wire(server.accept()[0])
                        selector.register(wire.connection, selectors.EVENT_READ, wire)
                    elif not self._take_in(key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
            # The port is free while JAX does not use it yet; nobody else asks for one like it.
            with socket.socket() as free:
                free.bind(("", 0))
                self._port = free.getsockname()[1]
            self._tell_all({"names": list(self._names.items()), "port": self._port})

    def _take_in(self, wire: _Wire) -> bool:
        """Reads a greeting; False where the connection is of no use any more."""
        messages = wire.receive()
        if messages is None:
            if self._wires.get(wire.process) is wire:
                del self._wires[wire.process]
            return False
        for message in messages:
            number, count, name = (message.get(word) for word in ("process", "count", "host"))
            if not isinstance(number, int):
                return False
            if refusal := self._refusal(number, count):
                wire.send({"refused": refusal})
                return False
            wire.process = number
            self._wires[number], self._names[number] = wire, name
        return True

    def _refusal(self, number: Any, count: Any) -> str | None:
        if number in self._wires or number == 0:
            return (
                f"there is a process {number} already, on host {self._names[number]}: give each process of "
                "the job its own MLP_MEMORY_PROCESS"
            )
        if count != self.count or number not in range(self.count):
            return (
                f"process 0 was told of {self.count} processes, process {number} of {count}: give all the "
                "same MLP_MEMORY_PROCESSES"
            )
        return None

    def _listen(self) -> socket.socket:
        port = int(self._place.address.rpartition(":")[2])
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at port {port}: {error.strerror}; give MLP_MEMORY_COORDINATOR "
                "another, or end the job that holds it"
            ) from error

    def _answer(self, deadline: float) -> None:
        """Another process: greets process 0 and waits for the rest."""
        host, _, port = self._place.address.rpartition(":")
        while time.monotonic() < deadline:
            try:
                wire = _Wire(socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS))
            except OSError:  # not there yet, or its name not yet known
                time.sleep(_RETRY_SECONDS)
                continue
            wire.send({"process": self.index, "count": self.count, "host": socket.gethostname()})
            # From now on it is process 0 that gives up, at most so long after it has started.
            wire.connection.settimeout(self._config.start_timeout + _GRACE_SECONDS)
            for messages in iter(wire.receive, None):
                for told in messages:
                    if "refused" in told:
                        raise UserError(told["refused"])
                    if "port" in told:
                        self._names, self._port = dict(map(tuple, told["names"])), told["port"]
                        wire.connection.settimeout(_SEND_SECONDS)
                        wire.process, self._wires = 0, {0: wire}
                    elif self._wires:  # process 0 has gone on already
                        self._hear(wire, told)
                if self._wires:
                    return
            wire.connection.close()  # process 0 ended; another may be started
            time.sleep(_RETRY_SECONDS)
        raise UserError(
            f"process 0{self._on_host(0)} did not answer at {self._place.address} within hosts.start_timeout "
            f"= {self._config.start_timeout:g} s: start the same command there, or look at its log"
        )

    def _missing(self) -> UserError:
        """What process 0 has to say of the processes that did not come."""
        missing = [process for process in range(1, self.count) if process not in self._wires]
        named = ", ".join(f"{process}{self._on_host(process)}" for process in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return UserError(
            f"{len(missing)} of {self.count} processes did not come within hosts.start_timeout = "
            f"{self._config.start_timeout:g} s: process {named}{more}; start the same command there, or look "
            "at their logs"
        )

    def _on_host(self, process: int) -> str:
        return f" (host {self._names[process]})" if process in self._names else ""

    def _tell_all(self, message: dict[str, Any] | None) -> None:
        for wire in list(self._wires.values()):
            wire.send(message)

    def _watch(self) -> None:
        """The roll's thread: gives and takes signs of life, and ends this process when another is gone."""
        limit = self._config.heartbeat_timeout
        selector, beat = selectors.DefaultSelector(), 0.0
        for wire in self._wires.values():
            selector.register(wire.connection, selectors.EVENT_READ, wire)
        while self._wires:
            for key, _ in selector.select(min(limit / 4, 1.0)):
                wire = key.data
                messages = wire.receive()
                for message in messages or []:
                    self._hear(wire, message)
                if messages is None:
                    selector.unregister(wire.connection)
                    wire.connection.close()
                    del self._wires[wire.process]
                    if not wire.left:
                        self._end(wire.process, "is gone: it ended, was killed or lost its host")
            now = time.monotonic()
            if now - beat > limit / 4:
                self._tell_all(None)
                beat = now
            for wire in list(self._wires.values()):
                if now - wire.heard > limit and not wire.left:
                    self._end(wire.process, f"has been silent for hosts.heartbeat_timeout = {limit:g} s")
        with self._changed:
            self._dismissed = True
            self._changed.notify_all()

    def _hear(self, wire: _Wire, message: dict[str, Any]) -> None:
        with self._changed:
            if "agree" in message:
                self._agreed.append(message["agree"])
            if "left" in message:
                wire.left = True
                self._dismissed |= wire.process == 0
            self._changed.notify_all()
        if "failed" in message:
            wire.left = True
            self._end(wire.process, f"failed: {message['failed']}", message["code"], _GRACE_SECONDS)
        if "lost" in message:
            self._end(message["lost"], message["why"], message["code"], message["grace"])

    def _end(self, process: int, why: str, code: int = 1, grace: float = 0.0) -> None:
        """Ends this process, and through process 0 the others, because of one that is lost.

        The main thread may be deep in a computation that will never end, so nothing is raised there. One
        that has failed (rather than died) leaves the others the time to find the same.
        """
        if self.index == 0:
            self._tell_all({"lost": process, "why": why, "code": code, "grace": grace})
        with self._changed:
            if grace and self._changed.wait_for(lambda: self._leaving, grace):
                return
        told = f"error: process {process}{self._on_host(process)} {why}"
        os.write(2, (f"{told}\n" if code == 2 else f"{told}; {_AGAIN}\n").encode())
        for wire in self._wires.values():
            wire.end()
        os._exit(code)

    def leave(self) -> None:
        """Takes leave of the others once all have come to this point, and process 0 to its end."""
        if self.count == 1:
            return
        if self._started:
            import jax

            jax.distributed.shutdown()  # returns when every process is here
        self._tell_all({"left": self.index})
        if self.index == 0:
            for wire in list(self._wires.values()):
                wire.left = True  # they may go now, without a word
                wire.end()  # closed when the other end is: what is on the way is not cut off
        with self._changed:
            self._changed.wait_for(lambda: self._dismissed, None if self.index else _GRACE_SECONDS)
            self._leaving = True
        for wire in list(self._wires.values()):
            wire.end()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends with an error, unless one of them is why."""
        interrupted = isinstance(error, KeyboardInterrupt)
        code = 130 if interrupted else 2 if isinstance(error, UserError) else 1
        # What JAX says of a peer that failed is less than what that one told: let the roll's thread end this.
        time.sleep(_GRACE_SECONDS + 1 if code == 1 else _VERDICT_SECONDS)
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._tell_all({"failed": first_line(error), "code": code})
        for wire in list(self._wires.values()):
            wire.end()
        # JAX's and Orbax's own ways out wait for the others, who are not coming.
        atexit.register(_end_now, code)
        timer = threading.Timer(_GRACE_SECONDS, _end_now, [code])
        timer.daemon = True
        timer.start()


def _end_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[Hosts]:
    """The job that this process is part of, all of its processes there.

    While it lasts, the loss of any process ends the others with a line that names it, and exit code 1; one
    that fails, with its own exit code.

    Raises:
      UserError: a process did not come, or the environment does not say who is who.
    """
    place = find_place(config.start_timeout)
    hosts = Hosts(place, config)
    if place is None:
        yield hosts
        return
    hosts.call_roll()
    try:
        yield hosts
        hosts.leave()
    except SystemExit:  # agreed on by all: a save on SIGTERM
        hosts.leave()
        raise
    except BaseException as error:
        hosts.fail(error)
        raise
