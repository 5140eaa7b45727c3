"""Train an embedding on a folder of images without labels, and index the images."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import torch

from pml_tacl.callbacks import LogLosses, TensorBoardLogger, chain
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.building import training_model
from pml_tacl.cli.eval_folder import can_measure, images_to_test_on
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.clustering import KMeansPseudoLabeler
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.inference import (
    embed_distributed,
    evaluate_distributed,
    is_main,
    run_on_main,
)
from pml_tacl.search import ImageIndex
from pml_tacl.trainers import UnsupervisedTrainer, defaults
from pml_tacl.trainers.checkpoint import checkpoints, place_of
from pml_tacl.trainers.recipe import recipe_for
from pml_tacl.transforms import SiameseTransform
from pml_tacl.utils.device import device_or_default
from pml_tacl.utils.errors import InputError, MissingPackageError
from pml_tacl.utils.signals import Interrupted
from pml_tacl.utils.words import counted


def run(args: Any, results: TextIO) -> dict[str, Any] | None:
    """Train, on a GPU if there is one, and write a run folder; see `pml_tacl.cli.main`.

    The folder contains the model, the search index, metrics.json, figures, records and
    checkpoints.
    """
    again = flags.command_line("train", "--resume", "--run", args.run)
    try:
        return train(args)
    except Interrupted as stop:
        print(f"{stop}: {again} resumes it", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        if not (args.run / "run.json").is_file():
            raise
        saved = checkpoints(args.run / "checkpoints")
        how = "resumes it" if saved else "starts again, because nothing has been saved yet"
        print(f"stopped by SIGINT: {again} {how}", file=sys.stderr)
        sys.exit(130)


def _check_resumed(args: Any, run: TrainingRun) -> None:
    """Raise InputError if the weights would differ in kind from those that a run began with."""
    before = runs.read_config(args.run).get("weights") if run.begun else args.weights
    if (before is False) != (args.weights is False):
        began = "from scratch" if before is False else "with pretrained weights"
        raise InputError(f"{args.run} began {began}: resume without --weights, or give another run")


def _check_epochs(run: Path, epochs: int, begun: bool) -> None:
    """Raise InputError if a run to resume was trained for more epochs."""
    saved = checkpoints(run / "checkpoints") if begun else []
    if not saved:
        return
    ended, iterations = place_of(saved[-1])
    trained = max(1, ended + (iterations > 0))
    if epochs < trained:
        raise InputError(
            f"epochs={epochs} is below the {counted(trained, 'epoch')} that {run} was trained for: "
            "give at least as many, or another run"
        )


def train(args: Any) -> dict[str, Any] | None:
    """Train with parsed arguments; return the result on the main process, None on the others."""
    # open() may delete an earlier run, so validate all arguments first.
    if args.tensorboard and find_spec("tensorboard") is None:
        raise MissingPackageError("--tensorboard needs tensorboard: pip install tensorboard")
    begin = {"resume": args.resume, "overwrite": args.overwrite}
    apart = [args.images, args.eval_folder, args.files if args.overwrite else None]
    run = TrainingRun(args.run, apart_from=apart, **begin)
    _check_resumed(args, run)
    runs.seed_everything(args.seed)
    device = device_or_default(args.device)
    bars = flags.bars(args)
    scratch = args.weights is False
    model = training_model(vars(args), False if run.begun else args.weights)
    model = model.to(device).to(memory_format=torch.channels_last)
    frozen = model.trunk.freeze_batchnorm
    recipe = recipe_for(model)
    size = (args.image_size,) * 2 if args.image_size else model.data_config["input_size"][1:]
    plain = model.transform(image_size=size)
    views = SiameseTransform.for_model(model, size)
    images = run_on_main(
        lambda: ImageFiles(args.images, strict=args.strict, progress=bars, **flags.choice(args)),
        "reading the images",
    )
    labelled = args.eval_folder and run_on_main(
        lambda: images_to_test_on(args.eval_folder, images, plain, bars, needed=False),
        "reading the test",
    )
    tested = labelled if labelled and can_measure(labelled) else None
    count = len(images)
    epochs = recipe.epochs(count) if args.epochs is None else args.epochs
    _check_epochs(args.run, epochs, run.begun)
    warmup = recipe.warmup_epochs(epochs) if args.warmup_epochs is None else args.warmup_epochs
    rate = recipe.learning_rate if args.learning_rate is None else args.learning_rate
    clusters = recipe.clusters(count) if args.num_clusters == "auto" else args.num_clusters
    config = flags.settings_of(args) | {
        "image_size": size,
        "num_clusters": clusters,
        "epochs": epochs,
        "warmup_epochs": warmup,
        "learning_rate": rate,
        "freeze_batchnorm": frozen,
    }
    for name, files in (("image_files", images), ("eval_image_files", labelled)):
        if files:  # the folder may move before a resume
            digest = partial(runs.digest_of, files.names, files.paths)
            config[name] = run_on_main(digest, "reading the images")

    settings = {"num_workers": args.workers, "progress": bars}
    test = None if tested is None else _test_on(tested, model, **settings)
    if epochs:
        optimizer = defaults.default_optimizer(model, replace(recipe, learning_rate=rate))
        trainer = UnsupervisedTrainer(
            model,
            optimizer,
            args.batch_size,
            dataset=images,
            transform=views,
            eval_transform=plain,
            labeler=KMeansPseudoLabeler(clusters, seed=args.seed),
            images_per_cluster=args.images_per_cluster,
            warmup_epochs=warmup,
            swap="default" if args.swap else None,
            guard=args.guard,
            checkpoint_every=args.checkpoint_every,
            dataloader_num_workers=args.workers,
            progress=bars,
        )
        steps = epochs * trainer.iterations_per_epoch
        trainer.lr_schedulers[defaults.SCHEDULE] = defaults.default_schedule(optimizer, steps)
    seen = images.with_transform(plain)
    if scratch and not run.begun:
        trained_start = torch.utils.data.DataLoader(
            seen, 64, shuffle=True, num_workers=args.workers
        )
        model.fit_projection(trained_start, progress=is_main() and bars)
    free = ("epochs", "warmup_epochs", "images", "eval_folder", "weights", "exclude", "files")
    run.open(config, free=free)
    tell_start(args, run, images, config, device, trainer if epochs else None)
    if epochs:
        hooks: list[Any] = [trainer.end_of_iteration_hook]
        if not (bars or args.quiet) and is_main():
            lines = _EpochLines(epochs)
            hooks.append(lines.note)
            own: Any = trainer.end_of_epoch_hook
            trainer.end_of_epoch_hook = chain(own, lines.tell)
        logger = None
        if args.tensorboard and is_main():
            logger = TensorBoardLogger(run.folder / "tensorboard")
            hooks.append(LogLosses(logger))
        trainer.end_of_iteration_hook = chain(*hooks)
        rows = run.train(trainer, epochs, test)
        if logger is not None:
            logger.close()
    else:
        rows = run.fit(model, seen, test, **settings)
    found = embed_distributed(model, seen, **settings)
    if not is_main():
        return None
    assert found is not None
    ImageIndex.of(images, found[0]).save(run.folder)
    run.draw(model, seen, found[0])
    if tested is not None:
        print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {args.eval_folder}")
    verdict = trainer.verdict if epochs else ""
    if verdict:
        print(f"\n{verdict}")
    print(
        f"\n{counted(count, 'image')} indexed in {args.run}: "
        f"{flags.command_line('search', args.run, 'QUERY')} finds similar images, "
        f"{flags.command_line('serve', args.run)} opens a search page"
    )
    return {
        "run": str(args.run),
        "images": count,
        "dimensions": found[0].shape[1],
        "epochs": epochs,
        "metrics": rows,
        "verdict": verdict or None,
    }


def _test_on(images: ImageFiles, model: Any, **settings: Any) -> Callable[[int], dict[str, float]]:
    """Return the test function for a :class:`TrainingRun`."""
    return lambda epoch: evaluate_distributed(model, images, **settings)


def tell_start(
    args: Any,
    run: TrainingRun,
    images: ImageFiles,
    config: dict[str, Any],
    device: torch.device,
    trainer: UnsupervisedTrainer | None,
) -> None:
    """Print whether the run resumes, and its images, model, device, epochs and clusters."""
    if not is_main():
        return
    height, width = config["image_size"]
    size = f"{height} px" if height == width else f"{height} x {width} px"
    what = f"{counted(len(images), 'image')}, {args.backbone} at {size}, on {device}"
    saved = checkpoints(run.folder / "checkpoints") if run.begun else []
    if args.resume and not saved:
        print(f"{args.run} contains no checkpoint to resume: starting a new training")
    if trainer is None:
        print(f"indexing without training: {what}")
        return
    epochs, warmup = config["epochs"], config["warmup_epochs"]
    ended = place_of(saved[-1])[0] if saved else 0
    if saved and ended >= epochs:
        done = "its only epoch" if epochs == 1 else f"all {epochs} epochs"
        print(f"the run has completed {done}: give more --epochs to continue; indexing again")
    elif saved:
        print(f"resuming {args.run} after epoch {ended} of {epochs} ({saved[-1].name})")
    print(f"training: {what}")
    since = f"from epoch {warmup + 1} on" if warmup else "from the first epoch on"
    print(
        f"{counted(epochs, 'epoch')} of {counted(trainer.iterations_per_epoch, 'step')}, "
        f"batches of {trainer.batch_size}; {counted(config['num_clusters'], 'cluster')}, {since}"
    )
    if warmup >= epochs:
        print(
            f"warning: training will not cluster, because --epochs {epochs} is not above "
            f"--warmup-epochs {warmup}: give more epochs, or fewer warm-up epochs",
            file=sys.stderr,
        )


class _EpochLines:
    """Hooks that print a line at the end of each epoch, for log files instead of bars."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._begin()

    def _begin(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._began = perf_counter()

    def note(self, trainer: Any) -> None:
        """Store the loss of an iteration."""
        self._losses.append(torch.as_tensor(trainer.losses["total_loss"]).detach().float())

    def tell(self, trainer: Any) -> None:
        """Print the mean loss and the duration of an epoch."""
        loss = float(torch.stack(self._losses).mean()) if self._losses else float("nan")
        seconds = perf_counter() - self._began
        print(f"epoch {trainer.epoch}/{self.epochs}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
        self._begin()
