"""When a trainer writes its checkpoints, reads them and ends."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pytorch_metric_learning.trainers import BaseTrainer
from torch import Tensor

from pml_tacl.distributed.session import highest, on_first
from pml_tacl.distributed.training import equalise, restore_random, states_of_others
from pml_tacl.trainers._records import LossesFile
from pml_tacl.trainers._restoring import fresh_schedules
from pml_tacl.trainers.checkpoint import (
    load_checkpoint,
    open_folder,
    restore_trainer,
    save_checkpoint,
    trainer_state,
)
from pml_tacl.utils.errors import InputError
from pml_tacl.utils.signals import Interrupted, Signals


class Resumable(BaseTrainer):
    """The checkpoints of an :class:`UnsupervisedTrainer`, by its own hand and by the user's."""

    def stand_at_start(self) -> None:
        """Where a training is before it has begun."""
        self.extra: dict[str, Any] = {}
        self.test_hook: Callable[[Any], None] | None = None  # each epoch, on every process
        self.test_epochs: Collection[int] = ()  # at whose end all is saved before the test
        self.losses_file: LossesFile | None = None
        self.schedules: dict[str, Any] = {}  # before their first step
        self.epoch = self.ended = self.done = 0
        self.order: Tensor | None = None  # of the epoch that runs
        self.stopped = False
        self._within_step = self._loaded_within_epoch = False
        self.others: list[dict[str, Any]] | None = None  # of the other processes, in a hook
        self._own_folder: Path | None = None
        self._signals = Signals(active=False)

    def save_checkpoint(
        self, folder: str | Path, keep: int = 2, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Write everything that :meth:`load_checkpoint` needs to go on as if never stopped.

        In many processes all must call it, or a hook; the first writes.

        Args:
            folder: the file is ``epoch_NNNN.pt`` in it, named by the epochs that have ended, or
                ``epoch_NNNN_iteration_NNNNNN.pt`` within the next one.
            keep: how many of the last checkpoints stay.
            extra: added to ``trainer.extra``.

        Raises:
            InputTypeError: if the state, or what is in ``trainer.extra``, holds what could not be
                read again; the message says where and what it is.
            OSError: if it cannot be written; earlier ones are left.
            ValueError: in an end_of_iteration_hook, where an iteration is not quite done.
        """
        if self._within_step:
            raise InputError(
                "a checkpoint within an iteration would not be whole: set checkpoint_every, or "
                "save in end_of_epoch_hook"
            )
        self.extra.update(extra or {})
        if self.losses_file is not None:
            self.losses_file.flush()
        if self.others is not None:  # in a hook of the first process
            return save_checkpoint(folder, trainer_state(self, self.others), keep)
        equalise(self)
        others = states_of_others(self)
        return on_first(
            lambda: save_checkpoint(folder, trainer_state(self, others), keep),
            "writing a checkpoint",
        )

    def load_checkpoint(self, path: str | Path | None = None) -> dict[str, Any]:
        """Restore a checkpoint (a folder: its last readable one); train on from ``epoch + 1``.

        Args:
            path: a file or folder; None for ``checkpoint_folder``, which must be set then.

        Returns:
            ``trainer.extra``, as it was saved.

        Raises:
            FileNotFoundError: if there is none.
            InputError: if it is damaged, or does not fit this trainer and its data set; the
                trainer is as it was then.
        """
        path = self.checkpoint_folder if path is None else path
        if path is None:
            raise InputError("load_checkpoint needs a path: the trainer has no checkpoint_folder")
        found = Path(path)
        state = on_first(lambda: load_checkpoint(found), "reading a checkpoint")
        self.prepare_for(state)
        restore_trainer(self, state)
        restore_random(state, self.batch_size)
        self._own_folder = found if found.is_dir() else found.parent
        self._loaded_within_epoch = self.order is not None
        return self.extra

    def prepare_for(self, state: Mapping[str, Any]) -> None:
        """Make what a checkpoint's state is restored into; a trainer with defaults has some."""

    def _begin(self, start_epoch: int) -> None:
        """Make sure that a training which is killed from here on can be resumed."""
        if self._loaded_within_epoch and start_epoch != self.ended + 1:
            raise InputError(
                f"the checkpoint is from within epoch {self.ended + 1}, got start_epoch="
                f"{start_epoch}: train with start_epoch=trainer.epoch + 1"
            )
        if not self._loaded_within_epoch:
            self.ended, self.done, self.order = start_epoch - 1, 0, None
        self.schedules = self.schedules or fresh_schedules(self)
        folder = self.checkpoint_folder
        place = (self.ended, self.done)
        if folder is not None and on_first(
            lambda: open_folder(folder, self._own_folder, place), "opening checkpoint_folder"
        ):
            self._save()  # or a crash in the first epoch would leave records without a checkpoint

    def _between_iterations(self, due: bool) -> None:
        """Save if it is time to, or if the training is asked to end; then end it."""
        if self.checkpoint_folder is None:
            return
        signum = highest(self._signals.received or 0)  # all processes stop after one iteration
        if not (due or signum):
            return
        self.look_at_losses()  # a model that has diverged must not take the place of a sound one
        path = self._save()
        if signum:
            where = f"epoch {self.epoch}, iteration {self.done} of {self.iterations_per_epoch}"
            if self.order is None:
                where = f"the end of epoch {self.ended}"
            raise Interrupted(signum, f"saved at {where}, in {path}")

    def _save(self) -> Path:
        assert self.checkpoint_folder is not None
        self._own_folder = self.checkpoint_folder
        return self.save_checkpoint(self.checkpoint_folder, self.keep)
