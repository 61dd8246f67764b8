"""A Python whose programs are forks of a process that has the slow imports done, for programs that we do not start.

SLURM and shell scripts start ``python`` themselves. ``forked_python`` makes a folder with a ``python`` and a ``dico``
that can stand in its place: each is a small client that sends its arguments, environment, folder and streams to a
server. The server forks, and the fork runs the program. The client passes signals on and ends with the exit code of
the fork; if the client is killed, so is the fork. What cannot be forked (see ``tests.forkserver``) is started as usual.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a client it starts without the environment's packages

from tests import forkserver  # noqa: E402

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


@contextlib.contextmanager
def forked_python(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Path]:
    """The folder of the programs ``python`` and ``dico``, which work until the context is left.

    folder: a short path, because the server's socket lies in it. environment: that of the server, whose libraries
    have read some variables on import; by default that of this process.
    """
    folder.mkdir()
    here = folder / "socket"
    for name, arguments in (("python", ""), ("dico", "-m dico_t2i ")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {here} {arguments}"$@"\n')
        program.chmod(0o755)
    command = [sys.executable, "-m", __name__, str(here)]
    env = {**(os.environ if environment is None else environment), **forkserver.ONE_THREAD}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
    try:
        while not here.exists():
            assert server.poll() is None, "the server of the forked Python has ended; its output is above"
            time.sleep(0.1)
        yield folder
    finally:
        server.terminate()
        server.wait()


def client(server: str, arguments: list[str]) -> NoReturn:
    """Run a program as a fork of the server, or as usual where it cannot be one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        answer = json.loads(connection.recv(2**20))
        if arguments[:1] == ["-"]:
            arguments = ["-c", sys.stdin.read(), *arguments[1:]]
        env = answer["set_on_import"] | dict(os.environ)
        if not forkserver.forkable(arguments, env, answer["env"]):
            os.execv(sys.executable, [sys.executable, *arguments])
        with os.fdopen(os.memfd_create("request"), "w+") as file:
            json.dump({"arguments": arguments, "env": env, "cwd": str(Path.cwd()), "new_session": True}, file)
            file.flush()
            socket.send_fds(connection, [b"fork"], [file.fileno(), 0, 1, 2])
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        status = connection.recv(16)
    code = int(status) if status else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(path: str) -> NoReturn:
    """Answer clients until this process is ended."""
    set_on_import = forkserver.preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    greeting = json.dumps({"env": dict(os.environ), "set_on_import": set_on_import}).encode()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".new")
    listener.listen(64)
    Path(path + ".new").rename(path)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.send(greeting)
            _run_for(connection)
        connection.close()


def _run_for(connection: socket.socket) -> NoReturn:
    """Run the client's program in a fork of this process, which stands between the two until one of them ends."""
    message, received, _, _ = socket.recv_fds(connection, 16, 4)
    if not message:
        os._exit(0)  # the client has found that it cannot be forked
    file, *streams = received
    with os.fdopen(file) as request:
        request.seek(0)
        program = forkserver.Program(**json.load(request))
    child = os.fork()
    if child == 0:
        connection.close()
        program.prepare(streams)
        program.run_to_its_end()
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while True:
        ready = select.select([connection, ended], [], [])[0]
        if ended in ready:
            break
        number = connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number[0] if number else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def main(path: str, *arguments: str) -> Any:
    if arguments:
        client(path, list(arguments))
    serve(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
