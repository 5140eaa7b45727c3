"""A loader's process that was lost, told in one line."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data._utils import signal_handling


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn torch's error about a killed loader's process into an OSError that says what to do.

    Within, it is raised where a batch is waited for. Torch's handler of SIGCHLD would raise it
    anywhere: within an optimizer's step, or in a destructor, which swallows it.
    """
    handler = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal_handling._set_SIGCHLD_handler()  # once for ever, so not later within
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    # The last three: a batch was on its way when its sender went.
    except (RuntimeError, EOFError, ConnectionResetError, ConnectionRefusedError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ChildProcessError(
            f"a process that reads pictures was lost ({reason}), perhaps for want of memory: "
            "resume, with smaller dataloader_num_workers if it happens again"
        ) from error
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
