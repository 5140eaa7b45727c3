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
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import pml_tacl
from pml_tacl import runs
from pml_tacl.datasets import ImageFiles
from pml_tacl.processes import embed_together, evaluate_together, is_first, on_first, session
from pml_tacl.search import PictureIndex
from pml_tacl.training_run import TrainingRun

LOSS_WEIGHTS = {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0}
IMAGES_PER_CLUSTER = 4  # in a batch
FREE = {"run", "resume", "overwrite", "strict", "workers", "checkpoint_every"}  # may differ later


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
    add(
        "--num-clusters",
        type=number_or_auto,
        default="auto",
        help="a number; auto: a tenth of the pictures",
    )
    add("--epochs", type=int, default=20, help="passes over the pictures")
    add("--warmup-epochs", type=int, default=2, help="epochs before the first clustering")
    add("--batch-size", type=int, default=32, help="pictures of all processes, in two views each")
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
    return parser.parse_args()


def main() -> None:
    # An earlier run stays untouched until run.open: by then the arguments are found good.
    args = arguments()
    run = TrainingRun(args.run, resume=args.resume, overwrite=args.overwrite)
    root, apart = args.images.resolve(), "must lie apart: give --run"
    if root.is_relative_to(run.folder) or run.folder.is_relative_to(root):
        raise ValueError(f"the run, {run.folder}, and the pictures, {root}, {apart}")
    if args.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {args.epochs}")
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = {"pretrained": True, "none": False}.get(args.weights, args.weights)
    kept = {"freeze_batchnorm": args.freeze_batchnorm}
    model = pml_tacl.AttentionEmbedder(
        args.backbone, args.embedding_dim, False if run.begun else weights, **kept
    ).to(device, memory_format=torch.channels_last)
    size = (args.image_size,) * 2 if args.image_size else model.data_config["input_size"][1:]
    plain = model.transform(image_size=size)

    pictures = on_first(lambda: ImageFiles(root, strict=args.strict), "reading the pictures")
    files = [path.relative_to(root).as_posix() for path in pictures.paths]
    labelled = args.eval_folder and on_first(
        lambda: ImageFiles(args.eval_folder, labels="folder", transform=plain),
        "reading the labelled pictures",
    )
    clusters = max(2, len(files) // 10, args.batch_size // IMAGES_PER_CLUSTER)
    clusters = clusters if args.num_clusters == "auto" else args.num_clusters
    config = {name: value for name, value in vars(args).items() if name not in FREE}
    config |= {"images": str(root), "eval_folder": labelled and str(args.eval_folder.resolve())}
    config |= {"image_size": size, "num_clusters": clusters, "loss_weights": LOSS_WEIGHTS}
    config["pictures"] = hashlib.sha256(repr(files).encode("utf-8", "replace")).hexdigest()

    offset = model.cell_offset(size)
    groups = model.parameter_groups(args.learning_rate, 10 * args.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    views = {name: model.data_config[name] for name in ("mean", "std")} | {"cell_offset": offset}
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    trainer = pml_tacl.UnsupervisedTrainer(
        model, optimizer, args.batch_size, losses, pictures,
        transform=pml_tacl.SiameseTransform(size, model.grid(size), **views), eval_transform=plain,
        labeler=pml_tacl.KMeansPseudoLabeler(clusters, seed=args.seed),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=IMAGES_PER_CLUSTER, warmup_epochs=args.warmup_epochs,
        swap=None if args.no_swap else pml_tacl.SurroundingsSwap(cell_offset=offset),
        loss_weights=LOSS_WEIGHTS, checkpoint_every=args.checkpoint_every,
        dataloader_num_workers=args.workers,
    )  # fmt: skip
    steps = args.epochs * trainer.iterations_per_epoch + 1
    schedule = OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    trainer.lr_schedulers["trunk_scheduler_by_iteration"] = schedule
    if not run.begun:  # where the projection starts
        pictures.transform = plain
        shuffled = DataLoader(pictures, 64, shuffle=True, num_workers=args.workers)
        model.whiten(shuffled, progress=is_first())
        pictures.transform = None

    def measure(epoch: int) -> dict[str, float]:
        return evaluate_together(model, labelled, num_workers=args.workers) if labelled else {}

    run.open(config)
    rows = run.train(trainer, args.epochs, measure)
    pictures.transform = plain
    found = embed_together(model, pictures, num_workers=args.workers)
    if is_first():
        PictureIndex(found[0], files, root).save(run.folder)
        run.draw(model, pictures, found[0])
        if labelled:
            print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {args.eval_folder}")
        print(f"\n{len(files)} pictures indexed, in {args.run}; search with")
        print(f"    python examples/search.py {args.run} QUERY")


if __name__ == "__main__":
    with session(), runs.one_line_errors():
        main()
