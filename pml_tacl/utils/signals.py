"""SIGINT and SIGTERM in a training: noted, and acted upon where nothing is lost."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader


class Interrupted(SystemExit):
    """A signal ended the training and everything is saved; ``code`` is 128 and its number.

    Args:
        signum: of the signal.
        saved: where the training stands and what holds it, in one line.
    """

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(128 + signum)
        self.message = f"stopped by {signal.Signals(signum).name}: {saved}"

    def __str__(self) -> str:
        return self.message


class Signals:
    """The handlers of SIGINT and SIGTERM while a training runs in the main thread.

    The first signal is only noted, in ``received``, for the training to end at its next safe
    place; while :meth:`at_once` it ends there and then. The second does what it did before.

    Args:
        active: False leaves everything as it is.
    """

    def __init__(self, active: bool = True) -> None:
        self.received: int | None = None
        self._active = active and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()
        self._safe_now = ""

    def __enter__(self) -> "Signals":
        if self._active:
            for signum in (signal.SIGINT, signal.SIGTERM):
                # Ignored means ignored: nohup, or a script's background job.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    @contextmanager
    def at_once(self, saved: str) -> Iterator[None]:
        """Within, a signal need not wait: ``saved`` says what holds everything there is."""
        self._safe_now = saved
        try:
            if self.received is not None:
                raise Interrupted(self.received, saved)
            yield
        finally:
            self._safe_now = ""

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's process has inherited this: the training's own ends it
        self.__exit__()
        self.received = signum
        if self._safe_now:
            raise Interrupted(signum, self._safe_now)
        # Not through logging or print: the signal may have come within one of theirs.
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: ends after this iteration and a checkpoint; again: now\n".encode())


class ShieldedLoader(DataLoader[Any]):
    """A DataLoader whose processes obey none but their parent, from their first moment on."""

    def __iter__(self) -> Any:
        if self.num_workers:
            context = self.multiprocessing_context or multiprocessing
            served = context.get_start_method() == "forkserver"
            self.worker_init_fn = partial(obey_parent_alone, None if served else os.getpid())
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # What starts in here begins with both blocked; what comes meanwhile waits for us.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(parent: int | None, _worker: int) -> None:
    """Let none but its parent end a loader's process: Ctrl-C and SIGTERM often go to all of them.

    The training ends its loader when it has finished the iteration; a reader that is gone before
    would break that iteration.

    Args:
        parent: process of the training. One that is killed while this process starts is not
            missed by torch's own watch, which takes whoever is the parent by then for it. None
            where a server forks the loader's processes, and is the parent of all.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # only Linux says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()


def _obey(parent: int | None) -> None:
    served = multiprocessing.parent_process() if parent is None else None
    sender = parent if served is None else served.pid
    while served.is_alive() if served is not None else os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 2)
        if sent is not None and sent.si_pid == sender:
            break
    os._exit(0)
