"""Processes that start warm: torch, timm and pml_tacl are imported before they begin.

A fresh interpreter needs six seconds of CPU time for these imports. A server imports them once, and
forks itself for each process that a test asks for:

    process = warm.start(["-c", code, "argument"], cwd=folder)
    assert process.wait() == 0, process.errors()

The arguments are those after `python`: a script, `-m` and a module, or `-c` and code. The process
is like a fresh one in all that a script sees: environment, folder, `sys.argv`, `sys.path`,
`__main__`, standard streams, handlers of signals, unseeded generators, and how it ends.
`test_warm.py` compares both. Variables that a module reads when it is imported, such as HF_HOME,
are not read again.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = (
    "faiss",
    "matplotlib.pyplot",
    "numpy",
    "pytest",
    "pytorch_metric_learning.losses",
    "pytorch_metric_learning.miners",
    "record_keeper",
    "sklearn.cluster",
    "timm",
    "torch",
    "torch.distributed.fsdp",
    "torchvision",
)
NUMBER = 4  # size in bytes of each integer that is sent


class Process:
    """A process forked by the server, with the part of the interface of Popen that tests use."""

    def __init__(self, pid, ended, stdout, stderr):
        self.pid, self.returncode = pid, None
        self._ended, self._stdout, self._stderr = ended, stdout, stderr

    def poll(self, timeout=0.0):
        """Return the exit code, or None while the process runs."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._ended, selectors.EVENT_READ)
                if ready.select(timeout):
                    code = os.read(self._ended, 16)
                    os.close(self._ended)
                    assert code, "the server of warm processes is gone"
                    self.returncode = int(code)
        return self.returncode

    def wait(self, timeout=300.0):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def output(self):
        """Return its standard output so far; not for a pipe."""
        return Path(self._stdout).read_text("utf-8")

    def errors(self):
        """Return its standard error so far; not for a pipe."""
        return Path(self._stderr).read_text("utf-8")


class Warm:
    """Client of the server, which is launched by the first `start`."""

    def __init__(self):
        self._server, self._connection, self._lock = None, None, threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="warm")
        self._count = 0

    def start(self, words, *, cwd=ROOT, env=None, stdin=b"", stdout=None, stderr=None, group=False):
        """Start `python *words`.

        `group` runs it in a session of its own, and so in a process group of its own. `env` are
        variables to add to the environment of the tests; None removes one. OMP_NUM_THREADS is
        always 1. `stdin` are bytes for standard input, at most 64 kB.
        """
        environment = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1"}
        asked = {"words": [str(word) for word in words], "cwd": str(cwd), "group": group}
        asked["environment"] = {k: str(v) for k, v in environment.items() if v is not None}
        with self._lock, contextlib.ExitStack() as opened:
            connection = self._connect()
            self._count += 1
            paths = [Path(self._folder.name, f"{self._count}.{name}") for name in ("out", "err")]
            files = [
                opened.enter_context(path.open("wb")) if file is None else file
                for path, file in zip(paths, (stdout, stderr), strict=True)
            ]
            written = [file.name for file in files]
            reading, writing = os.pipe()
            assert os.write(writing, stdin) == len(stdin)  # a pipe takes 64 kB
            os.close(writing)
            ended, end = os.pipe()
            send(connection, asked, [reading, *(file.fileno() for file in files), end])
            for file in (reading, end):
                os.close(file)
            pid = int.from_bytes(receive(connection, NUMBER), "big")
        return Process(pid, ended, *written)

    def run(self, words, timeout=300.0, **settings):
        """Run a process to its end, as subprocess.run does, with its output as text."""
        process = self.start(words, **settings)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, code, process.output(), process.errors())

    def close(self):
        """End the server, which kills the processes that are left."""
        if self._server is not None:
            # A process that a test has forked may have inherited the socket: close() is not enough.
            self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._server.wait(60)
        self._folder.cleanup()

    def _connect(self):
        if self._server is None:
            self._connection, other = socket.socketpair()
            places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places).strip(":")}
            with other:
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "tests.warm", str(other.fileno())],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    pass_fds=[other.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # so it is buffered like a file
                )
        return self._connection


def send(connection, asked, files):
    """Send a request as JSON, with open files."""
    words = json.dumps(asked).encode()
    socket.send_fds(connection, [len(words).to_bytes(NUMBER, "big")], files)
    connection.sendall(words)


def receive(connection, count):
    """Return so many bytes."""
    found = connection.recv(count, socket.MSG_WAITALL)
    assert len(found) == count, "the server of warm processes is gone"
    return found


def import_all():
    """Import what scripts and trainings need. This starts no thread, which a fork would lose."""
    for name in MODULES:
        importlib.import_module(name)
    package = importlib.import_module("pml_tacl")
    for module in pkgutil.walk_packages(package.__path__, "pml_tacl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def serve(connection):
    """Fork for each request. Return what was asked in the new process, and None in the server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waking, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    import_all()
    gc.collect()
    gc.freeze()
    running = {}  # process id -> write end of the pipe that reports its exit code
    with selectors.DefaultSelector() as ready:
        for file in (connection, waking):
            ready.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj == waking:
                    os.read(waking, 1000)
                    report_exits(running)
                    continue
                size, files, *_ = socket.recv_fds(connection, NUMBER, 4)
                if not size:
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    while running:
                        report_exits(running, 0)
                    return None
                asked = json.loads(receive(connection, int.from_bytes(size, "big")))
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for file in (*running.values(), files.pop(), waking, wake):
                        os.close(file)
                    connection.close()
                    return asked, files
                running[pid] = files.pop()
                for file in files:
                    os.close(file)
                connection.sendall(pid.to_bytes(NUMBER, "big"))


def report_exits(running, how=os.WNOHANG):
    while running:
        pid, status = os.waitpid(-1, how)
        if pid == 0:
            return
        pipe = running.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # no test waits for it any more
            os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(pipe)


def become(asked, files):
    """Make this process like a fresh one, and run what is asked."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if asked["group"]:
        os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for signum, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGCHLD, signal.SIG_DFL),
    ):
        signal.signal(signum, handler)
    random.seed()
    sys.modules["numpy"].random.seed()
    first, *words = asked["words"]
    main = types.ModuleType("__main__")
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), ["-m", *words[1:]]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main
    if first == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[1:]]
        code = compile(words[0], "<string>", "exec")
    else:
        sys.path[0], sys.argv = str(Path(first).resolve().parent), [first, *words]
        main.__file__ = first
        code = compile(Path(first).read_bytes(), first, "exec")
    exec(code, vars(main))


if __name__ == "__main__":
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(*request)
