"""A process that starts warm does what a fresh interpreter does."""

import os
import signal
import subprocess
import sys

import pytest

from tests.processes import begin, meeting, wait_for_all

pytestmark = pytest.mark.slow

LOOK = """
import json, os, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "name": __name__,
    "file": globals().get("__file__"), "main": sys.modules["__main__"].__dict__ is globals(),
    "read": sys.stdin.buffer.read().hex(), "buffered": sys.stdout.line_buffering,
    "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "threads": threading.active_count(), "variables": sorted(os.environ.items()),
    "files": len(os.listdir("/dev/fd")), "ready": os.get_blocking(0),
}))
print("not an answer", file=sys.stderr)
"""
# How a process may end, with its code.
ENDINGS = {
    "pass": 0,
    "import atexit, sys; atexit.register(print, 'at exit'); sys.exit(3)": 3,
    "raise SystemExit('a line')": 1,
    "raise KeyError('a traceback')": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGINT)": -signal.SIGINT,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os, threading; threading.Thread(target=print, args=['a thread']).start()": 0,
    "import os; os._exit(7)": 7,
}


def fresh(words, folder, stdin=b"", **variables):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        input=stdin,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("how", ["code", "script", "module"])
def test_it_sees_what_a_fresh_interpreter_sees(warm, tmp_path, how):
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "other").mkdir()
    words, folder = {
        "code": (["-c", LOOK, "-x", "a b"], tmp_path),
        "script": ([tmp_path / "look.py", "-x"], tmp_path / "other"),
        "module": (["-m", "look", "-x"], tmp_path),
    }[how]
    given = {"RANK": "1", "stdin": b"\xff\n"}
    stdin = given.pop("stdin")
    done = warm.run(words, cwd=folder, env=given, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert (0, done.stdout, done.stderr) == fresh(words, folder, stdin, **given)


@pytest.mark.parametrize("code", ENDINGS)
def test_it_ends_as_a_fresh_interpreter_ends(warm, tmp_path, code):
    done = warm.run(["-c", code], cwd=tmp_path)
    returncode, output, errors = fresh(["-c", code], tmp_path)
    assert (done.returncode, done.stdout) == (returncode, output)
    assert done.returncode == ENDINGS[code]
    assert done.stderr.splitlines()[-1:] == errors.splitlines()[-1:]


def test_its_generators_are_as_in_a_fresh_interpreter(warm):
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1))"
    one, two = (warm.run(["-c", code]).stdout.split(maxsplit=2) for _ in range(2))
    assert one[0] != two[0]
    assert one[1] != two[1]
    assert one[2] == two[2]  # torch's begins with a fixed seed


def test_it_is_warm_and_takes_signals(warm):
    code = """
import sys, time
loaded = {"torch", "timm", "faiss", "pml_tacl.trainers.unsupervised_trainer"} <= set(sys.modules)
print("loaded", loaded, flush=True)
time.sleep(600)
"""
    process = warm.start(["-c", code], group=True)
    try:
        while "loaded" not in process.output():
            assert process.poll(0.02) is None, process.errors()
        assert process.output() == "loaded True\n"
        assert os.getpgid(process.pid) == process.pid
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
        assert process.poll() == -signal.SIGTERM
        process.kill()  # which does nothing to what has ended
    finally:
        process.kill()


def test_the_output_of_ranks_that_fail_is_shown(warm, tmp_path):
    store = meeting()
    words = ["-c", "import os, sys; sys.exit('rank ' + os.environ['RANK'] + ' cannot go on')"]
    with pytest.raises(AssertionError, match=r"(?s)rank 0 cannot go on.*rank 1 cannot go on"):
        wait_for_all(begin(warm, words, 2, store, tmp_path))
