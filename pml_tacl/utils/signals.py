"""Handling of SIGINT and SIGTERM, which end a training only after it is saved."""

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
    """Exit of a training after a signal, with everything saved; ``code`` is 128 + ``signum``.

    Args:
        signum: number of the signal.
        saved: one line that says at which place and in which file the training was saved.
    """

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(128 + signum)
        self.message = f"stopped by {signal.Signals(signum).name}: {saved}"

    def __str__(self) -> str:
        return self.message


class Signals:
    """Handlers of SIGINT and SIGTERM for a training in the main thread.

    The first signal is stored in ``received``, and the training ends at the next safe place. Inside
    :meth:`at_once` the training ends immediately. The second signal calls the previous handler.

    Args:
        active: False changes no handlers.
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
                # Keep ignored signals ignored, as under nohup or in a background job.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    @contextmanager
    def at_once(self, saved: str) -> Iterator[None]:
        """Let signals end the training immediately inside the block.

        Args:
            saved: place of the last checkpoint, for the message of :class:`Interrupted`.
        """
        self._safe_now = saved
        try:
            if self.received is not None:
                raise Interrupted(self.received, saved)
            yield
        finally:
            self._safe_now = ""

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader's process that inherited the handler; the training ends it
        self.__exit__()
        self.received = signum
        if self._safe_now:
            raise Interrupted(signum, self._safe_now)
        # Not through logging or print, because the signal may have interrupted one of them.
        name = signal.Signals(signum).name
        text = (
            "training saves a checkpoint and ends after this iteration; a second signal ends it now"
        )
        os.write(2, f"\n{name}: {text}\n".encode())


class ShieldedLoader(DataLoader[Any]):
    """DataLoader whose worker processes ignore signals, except SIGTERM from their parent."""

    def __iter__(self) -> Any:
        if self.num_workers:
            context = self.multiprocessing_context or multiprocessing
            served = context.get_start_method() == "forkserver"
            self.worker_init_fn = partial(obey_parent_alone, None if served else os.getpid())
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # Workers start with both signals blocked; signals that arrive meanwhile stay pending.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(parent: int | None, _worker: int) -> None:
    """Make a worker process ignore SIGINT, and SIGTERM from any process but its parent.

    Ctrl-C and SIGTERM often reach all processes. The training ends its loader after the current
    iteration; a worker that ends earlier would break that iteration.

    Args:
        parent: process id of the training. With it, the worker also ends if the training is
            killed while the worker starts, which torch's own check misses. None if a fork server
            starts the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # only Linux tells the sender of a signal
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
