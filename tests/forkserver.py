"""Start Python programs as forks of a process that has the slow imports done: a tenth of a second in place of ten.

``run`` and ``Popen`` are those of ``subprocess``, and what they start behaves as it does there: a child process of
its own with the arguments, environment, folder, streams and session that it was given, with an exit code, and signals
that reach it. A command is forked if it is ``[sys.executable, ...]`` followed by a script, ``-m`` or ``-c``; all other
commands are started as ``subprocess`` does it. ``torchrun`` (``-m torch.distributed.run``) is the real one, and the
ranks that it starts are forks too.

How a fork becomes a child of this process: the server, which is a child of this process, forks twice and the process
in the middle ends at once. The kernel gives what it leaves behind to this process, which has declared itself the
reaper of orphans among its descendants for that moment. So ``waitpid`` and all that ``Popen`` builds on it work.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# What the programs import, and does not start a thread on import.
PRELOADED = (
    "dico_t2i.cli",
    "dico_t2i.export.portable.load",
    "dico_t2i.training.trainer",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.models.autoencoders.autoencoder_kl",
    "scipy.linalg",
    "matplotlib.pyplot",
)
# Libraries read variables with these names when they are imported: with another value, a program has to import them.
READ_ON_IMPORT = (
    "DICO_ALLOW_DOWNLOAD",
    "PYTHON",
    "LD_",
    "HF_",
    "HUGGINGFACE_",
    "TRANSFORMERS_",
    "DIFFUSERS_",
    "DS_",
    "TRITON_",
    "XDG_",
)
# With these, the imports start no thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
    """``subprocess.Popen``, with Python programs forked from the server."""

    def _execute_child(self, *arguments: Any) -> None:
        call = inspect.signature(super()._execute_child).bind(*arguments).arguments
        env = dict(os.environ if call["env"] is None else call["env"])
        if not _can_be_forked(call, env):
            super()._execute_child(*arguments)
            return
        ours = (call["p2cread"], call["c2pwrite"], call["errwrite"])
        streams = [given if given != -1 else standard for standard, given in enumerate(ours)]
        request = {
            "arguments": [os.fspath(word) for word in call["args"][1:]],
            "env": _server().set_on_import | env,
            "cwd": os.fspath(call["cwd"] or Path.cwd()),
            "new_session": call["start_new_session"],
        }
        try:
            self.pid = _server().fork(request, streams)
        finally:
            for pipe in (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread")):
                child_end, parent_end = (call[name] for name in pipe)
                if child_end != -1 and parent_end != -1:
                    os.close(child_end)
        self._child_created = True


def run(
    command: list[Any],
    *,
    check: bool = False,
    timeout: float | None = None,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """``subprocess.run``, with Python programs forked from the server."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def _can_be_forked(call: dict[str, Any], env: dict[str, str]) -> bool:
    """Whether a program looks, from inside, as it would after a start of its own."""
    command = call["args"]
    if not isinstance(command, (list, tuple)) or len(command) < 2 or os.fspath(command[0]) != sys.executable:
        return False
    unusual = any(call[name] for name in ("shell", "preexec_fn", "pass_fds", "executable"))
    unusual |= call["process_group"] != -1 or call["umask"] != -1 or any(call[x] is not None for x in ("uid", "gid"))
    if unusual:
        return False
    server = _server()
    arguments = [os.fspath(word) for word in command[1:]]
    return forkable(arguments, server.set_on_import | env, server.set_on_import | server.env)


def forkable(arguments: list[str], env: Mapping[str, str], servers: Mapping[str, str]) -> bool:
    """Whether these arguments name a program, and the libraries would read on import what they read in the server."""
    word = next(iter(arguments[arguments[:1] == ["-u"] :]), "")
    if not (word in ("-m", "-c") or word.endswith(".py")):
        return False
    names = {name for name in env.keys() | servers.keys() if name.startswith(READ_ON_IMPORT)}
    same = all(env.get(name) == servers.get(name) for name in names - {"PYTHONUNBUFFERED", "PYTHONPATH"})
    more = set(_more_folders(env)) - set(_more_folders(servers))
    return same and all(map(_hides_nothing, more))


def _more_folders(env: Mapping[str, str]) -> list[str]:
    """The folders of PYTHONPATH besides the repository's, which a server and its forks have."""
    return [folder for folder in env.get("PYTHONPATH", "").split(":") if folder not in ("", str(ROOT))]


def _hides_nothing(folder: str) -> bool:
    """Whether a folder of PYTHONPATH has no module in place of one that the server may have imported."""
    modules = {path.stem for path in Path(folder).glob("*.py")} | {p.parent.name for p in Path(folder).glob("*/*.py")}
    return modules <= {"sitecustomize"}


class _Server:
    """This process's end of the connection to its server."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.owner, self.lock = connection, os.getpid(), threading.Lock()
        self.env = dict(os.environ)
        self.set_on_import: dict[str, str] = json.loads(self._receive())

    def fork(self, request: dict[str, Any], streams: list[int]) -> int:
        """The process id of a new child of this process."""
        with os.fdopen(os.memfd_create("request"), "w+") as file, self.lock, _reaper_of_orphans():
            json.dump(request, file)
            file.flush()
            socket.send_fds(self.connection, [b"fork"], [file.fileno(), *streams])
            return int(self._receive())

    def _receive(self) -> bytes:
        answer = self.connection.recv(2**16)
        if not answer:
            raise ConnectionError("the fork server has ended; its output is above")
        return answer


_connection: _Server | None = None


def _server() -> _Server:
    """The server of this process, started at the first call."""
    global _connection
    if _connection is None or _connection.owner != os.getpid():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, **ONE_THREAD}
        command = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
        subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        _connection = _Server(ours)
    return _connection


@contextlib.contextmanager
def _reaper_of_orphans() -> Iterator[None]:
    """While the server answers, what its descendants leave behind becomes a child of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


@dataclass(frozen=True)
class Program:
    """What a fork is to become."""

    arguments: list[str]
    env: dict[str, str]
    cwd: str
    new_session: bool

    def prepare(self, streams: list[int]) -> None:
        """Make this process look as after a start: session, folder, environment, signals, streams, threads, seeds."""
        if self.new_session:
            os.setsid()
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.env)
        sys.path.append(str(ROOT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for standard, given in enumerate(streams):
            os.dup2(given, standard)
            os.close(given)
        unbuffered = self.arguments[0] == "-u" or bool(self.env.get("PYTHONUNBUFFERED"))
        sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
        sys.stdout = sys.__stdout__ = _stream(1, unbuffered, "strict")  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _stream(2, unbuffered, "backslashreplace")  # type: ignore[misc]
        import numpy as np
        import torch

        np.random.seed()
        torch.set_num_threads(int(self.env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))

    def run_to_its_end(self) -> NoReturn:
        """Run, and end as the interpreter does, without the second that it takes to free all that was imported."""
        code: Any = 0
        try:
            self.run()
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = -signal.SIGINT
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            code = 1
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        threading._shutdown()  # type: ignore[attr-defined]  # waits for all threads that are no daemons
        atexit._run_exitfuncs()
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code & 0xFF)

    def run(self) -> None:
        """Go on as the interpreter does with these arguments."""
        sys.orig_argv = [sys.executable, *self.arguments]
        # multiprocessing's name of the main module, under which processes send objects back.
        sys.modules["__mp_main__"] = alias = type(sys)("__mp_main__")
        alias.__getattr__ = lambda name: getattr(sys.modules["__main__"], name)  # type: ignore[method-assign]
        for folder in _more_folders(self.env):
            sys.path.append(folder)
            if (customize := Path(folder, "sitecustomize.py")).exists():
                runpy.run_path(str(customize))
        first, *rest = self.arguments[self.arguments[0] == "-u" :]
        if first == "-m":
            if rest[0] == "torch.distributed.run":
                _fork_the_ranks()
            sys.argv, sys.path[0] = rest, str(Path.cwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")


def _stream(number: int, unbuffered: bool, errors: str) -> io.TextIOWrapper:
    raw = os.fdopen(number, "wb", 0 if unbuffered else -1, closefd=False)
    line_buffering = number == 2 or raw.isatty()
    return io.TextIOWrapper(raw, errors=errors, line_buffering=line_buffering, write_through=unbuffered)


def _fork_the_ranks() -> None:
    """Give this process, before it starts a thread, a server of its own, and let torchrun start its ranks from it."""
    global _connection
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _serve(theirs, {})
    theirs.close()
    _connection = _Server(ours)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = Popen


def _serve(connection: socket.socket, set_on_import: dict[str, str]) -> NoReturn:
    """Fork on each request, until the other side ends."""
    connection.send(json.dumps(set_on_import).encode())
    while True:
        message, received, _, _ = socket.recv_fds(connection, 16, 4)
        if not message:
            os._exit(0)
        file, *streams = received
        with os.fdopen(file) as request:
            request.seek(0)
            program = Program(**json.load(request))
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if child := os.fork():
                os.write(write, str(child).encode())
                os._exit(0)
            while os.getppid() == middle:
                time.sleep(0.001)
            for descriptor in (read, write):
                os.close(descriptor)
            connection.close()
            program.prepare(streams)
            program.run_to_its_end()
        os.waitpid(middle, 0)
        connection.send(os.read(read, 16))
        for descriptor in (read, write, *streams):
            os.close(descriptor)


def _trace_the_tests_networks() -> None:
    """Trace the networks of most tests, as each run does once; the forks find the results in a cache."""
    from dico_t2i.config import parse_config
    from dico_t2i.plan.cost import traced_pass
    from tests.faults.harness import CONFIG
    from tests.training.conftest import TINY

    for tree in (CONFIG, TINY):
        config = parse_config({**tree, "data": {**tree["data"], "path": "none"}}, "forkserver")
        traced_pass(config, config.train.micro_batch)


def preload() -> dict[str, str]:
    """Do the slow imports and other first steps; returns the environment variables that they set.

    A process that has done them may fork.
    """
    from PIL import Image

    before = dict(os.environ)
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    _trace_the_tests_networks()
    Image.init()  # imports the readers of all formats
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        sys.exit(f"the fork server has {threads} threads after its imports; a fork would lose all but one")
    gc.freeze()
    gc.enable()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def main() -> None:
    """The server: import, then fork on request."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(connection, preload())


if __name__ == "__main__":
    main()
