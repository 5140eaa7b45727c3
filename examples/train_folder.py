"""Train an embedding on a folder of pictures, without labels, and index the pictures by it.

    python examples/train_folder.py IMAGES --backbone resnet50
    torchrun --nproc-per-node 4 -- examples/train_folder.py IMAGES --batch-size 128

Writes runs/folder/: the model, embeddings.npy, files.json and index.faiss for search.py,
metrics.json, figures, records, and a checkpoint of each epoch. The same script runs on a GPU if
there is one, and with torchrun on several, or in several processes on CPUs.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.utils.data import DataLoader, TensorDataset

from pml_tacl import (
    AttentionConsistencyLoss,
    AttentionConsistencyMiner,
    AttentionEmbedder,
    ContrastiveClusteringLoss,
    KMeansPseudoLabeler,
    SiameseTransform,
    SurroundingsSwap,
    UnsupervisedTrainer,
    runs,
)
from pml_tacl import visualize as vis
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import evaluate
from pml_tacl.processes import embed_together, is_first, on_first, session
from pml_tacl.search import PictureIndex
from pml_tacl.trainers.checkpoint import checkpoints

LOSS_WEIGHTS = {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0}
IMAGES_PER_CLUSTER = 4  # in a batch
FREE = {
    "run",
    "resume",
    "overwrite",
    "strict",
    "workers",
    "checkpoint_every",
}  # may differ when a run is resumed


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("images", type=Path, help="folder of pictures; its sub-folders are searched too")
    add("--run", type=Path, default=Path("runs/folder"), help="folder for the results")
    add("--backbone", default="resnet50", help="any timm model")
    add("--weights", default="pretrained", help="pretrained (through timm), none, or a local file")
    add("--eval-folder", type=Path, help="labelled pictures to test on: a sub-folder is a class")
    add("--num-clusters", type=number_or_auto, default="auto", help="auto: a tenth of the pictures")
    add("--epochs", type=int, default=20, help="passes over the pictures")
    add("--warmup-epochs", type=int, default=2, help="epochs before the first clustering")
    add("--batch-size", type=int, default=32, help="pictures of all processes, each in two views")
    add("--image-size", type=int, help="pixels; the backbone's own size if not given")
    add("--embedding-dim", type=int, default=512, help="numbers in an embedding")
    add("--learning-rate", type=float, default=1e-4, help="of the backbone; the head's is 10 times")
    add("--freeze-batchnorm", action="store_true", help="keep its statistics; for small batches")
    add("--no-swap", action="store_true", help="do not swap surroundings: they are what is shown")
    add("--workers", type=int, default=2, help="processes that read pictures")
    add("--checkpoint-every", type=int, help="iterations; also at each epoch's end")
    add("--seed", type=int, default=0, help="of everything random")
    add("--strict", action="store_true", help="stop at broken files instead of leaving them out")
    add("--resume", action="store_true", help="go on with the run that --run holds")
    add("--overwrite", action="store_true", help="replace the run that --run holds")
    args = parser.parse_args()
    if args.epochs < 1 or args.workers < 0:
        raise ValueError(
            "epochs must be at least 1 and workers at least 0, "
            f"got {args.epochs} and {args.workers}"
        )
    return args


def main() -> None:
    # An earlier run stays untouched until open_run; by then all that can be wrong is known.
    args = arguments()
    flags = {"resume": args.resume, "overwrite": args.overwrite}
    on_first(lambda: runs.check_run(args.run, **flags), "opening the run")
    root, run = args.images.resolve(), args.run.resolve()
    if root.is_relative_to(run) or run.is_relative_to(root):
        raise ValueError(f"the run, {run}, and the pictures, {root}, must lie apart: give --run")
    there = on_first(lambda: len(checkpoints(run / "checkpoints")), "opening the run")
    begun = args.resume and there > 0
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    weights = {"pretrained": True, "none": False}.get(args.weights, args.weights)
    try:
        model = AttentionEmbedder(
            args.backbone,
            args.embedding_dim,
            False if begun else weights,
            freeze_batchnorm=args.freeze_batchnorm,
        )
    except OSError as error:
        raise OSError(f"{error} (here: --weights FILE, or --weights none)") from error
    model = model.to(device, memory_format=torch.channels_last)
    size = (args.image_size,) * 2 if args.image_size else model.data_config["input_size"][1:]
    transform = model.transform(image_size=size)
    with torch.inference_mode():
        maps = model.eval().forward_features(torch.zeros(1, 3, *size, device=device)).feature_maps
    mean, std = model.data_config["mean"], model.data_config["std"]

    pictures = on_first(lambda: ImageFiles(root, strict=args.strict), "reading the pictures")
    labelled = None
    if args.eval_folder:
        labelled = on_first(
            lambda: ImageFiles(args.eval_folder, labels="folder", transform=transform),
            "reading the labelled pictures",
        )
    files = [path.relative_to(root).as_posix() for path in pictures.paths]
    clusters = args.num_clusters
    if clusters == "auto":  # and no fewer than a batch needs
        clusters = max(2, len(files) // 10, args.batch_size // IMAGES_PER_CLUSTER)
    config = {name: value for name, value in vars(args).items() if name not in FREE}
    config |= {"images": str(root), "eval_folder": labelled and str(args.eval_folder.resolve())}
    config |= {"image_size": size, "num_clusters": clusters, "loss_weights": LOSS_WEIGHTS}
    config["pictures"] = hashlib.sha256(repr(files).encode("utf-8", "replace")).hexdigest()

    def test_at(epoch: int) -> None:
        trainer.extra["recalls"][epoch] = {}
        if labelled:
            found = embed_together(model, labelled, num_workers=args.workers)
            trainer.extra["recalls"][epoch] = on_first(
                lambda: evaluate(torch.nn.Identity(), TensorDataset(*found), progress=False),
                "evaluating",
            )

    def end_iteration(trainer: UnsupervisedTrainer) -> None:
        hooks.end_of_iteration_hook(trainer)
        for name, value in trainer.losses.items():
            trainer.extra["history"].setdefault(name, []).append(float(value))

    def end_epoch(trainer: UnsupervisedTrainer) -> None:
        hooks.record_keeper.save_records()

    offset = model.cell_offset(size)
    groups = model.parameter_groups(args.learning_rate, 10 * args.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    trainer = UnsupervisedTrainer(
        model,
        optimizer,
        args.batch_size,
        {
            "metric_loss": MultiSimilarityLoss(),
            "clustering_loss": ContrastiveClusteringLoss(),
            "attention_loss": AttentionConsistencyLoss(),
        },
        pictures,
        transform=SiameseTransform(
            size, tuple(maps.shape[-2:]), mean=mean, std=std, cell_offset=offset
        ),
        eval_transform=transform,
        labeler=KMeansPseudoLabeler(clusters, seed=args.seed),
        mining_funcs={"attention_miner": AttentionConsistencyMiner()},
        images_per_cluster=IMAGES_PER_CLUSTER,
        warmup_epochs=args.warmup_epochs,
        swap=None if args.no_swap else SurroundingsSwap(cell_offset=offset),
        loss_weights=LOSS_WEIGHTS,
        checkpoint_folder=run / "checkpoints",
        checkpoint_every=args.checkpoint_every,
        dataloader_num_workers=args.workers,
        end_of_iteration_hook=end_iteration,
        end_of_epoch_hook=end_epoch,
    )
    trainer.lr_schedulers["trunk_scheduler_by_iteration"] = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=args.epochs * trainer.iterations_per_epoch + 1,
    )
    trainer.extra = {"history": {}, "recalls": {}}  # kept in the checkpoints
    if not begun:
        pictures.transform = transform
        shuffled = DataLoader(pictures, 64, shuffle=True, num_workers=args.workers)
        model.whiten(shuffled, progress=is_first())  # where the projection starts
        pictures.transform = None
        test_at(0)
    on_first(lambda: runs.open_run(run, config, **flags), "opening the run")
    if is_first():  # one process writes what all have learnt
        hooks = runs.make_hooks(run / "records")
        trainer.record_keeper = hooks.record_keeper
    if begun:
        trainer.load_checkpoint()
    trainer.train(start_epoch=trainer.epoch + 1, num_epochs=args.epochs)

    test_at(args.epochs)
    pictures.transform = transform
    found = embed_together(model, pictures, num_workers=args.workers)
    if not is_first():
        return
    history, recalls = trainer.extra["history"], trainer.extra["recalls"]
    rows = {"before": recalls[0], "after": recalls[args.epochs]}
    runs.write_json(run / "metrics.json", {**rows, "config": config, "versions": runs.versions()})
    model.eval().save_pretrained(run / "model")
    embeddings, _ = found
    index = PictureIndex(embeddings, files, root)
    index.save(run)

    def as_seen(rows: list[int]) -> torch.Tensor:
        normalised = torch.stack([pictures[row][0] for row in rows])
        scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (std, mean))
        return (normalised * scale + shift).clamp(0, 1)

    shown = torch.linspace(0, len(files) - 1, min(8, len(files))).long().tolist()
    nearest = [
        [row for row in found if row != query][:8]
        for query, found in zip(shown, index.search(embeddings[shown], k=9)[1], strict=True)
    ]
    with torch.inference_mode():
        batch = torch.stack([pictures[row][0] for row in shown]).to(device)
        attention = model.forward_features(batch).attention.cpu()
    figures = {
        "curves": vis.training_curves(history, recalls),
        "attention": vis.attention_overlay(as_seen(shown), attention),
        "gallery": vis.retrieval_gallery(as_seen(shown), [as_seen(found) for found in nearest]),
    }
    if labelled:
        figures["recall"] = vis.recall_curve(rows)
        print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {args.eval_folder}")
    for name, figure in figures.items():
        vis.save_figure(figure, run / f"{name}.png")
    print(
        f"\n{len(index)} pictures indexed, in {args.run}; search with\n"
        f"    python examples/search.py {args.run} QUERY"
    )


if __name__ == "__main__":
    with session(), runs.one_line_errors():
        main()
