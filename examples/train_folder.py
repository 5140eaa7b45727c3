"""Train an embedding on a folder of pictures, without labels, and index the pictures by it.

    python examples/train_folder.py IMAGES --backbone resnet50
    torchrun --nproc-per-node 4 -- examples/train_folder.py IMAGES --batch-size 128

Writes runs/folder/: the model, embeddings.npy, files.json and index.faiss for search.py,
metrics.json, figures, records, and a checkpoint of each epoch. Trains on GPUs if there are some.
"""

from functools import partial
from pathlib import Path

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import pml_tacl
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.eval_folder import images_to_test_on
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.inference import (
    embed_together,
    evaluate_together,
    is_first,
    on_first,
    session,
)
from pml_tacl.search import PictureIndex

CONFIG = {"run": "runs/folder", "seed": 0, "workers": 2, "strict": False}  # flags: see --help
CONFIG |= {"backbone": "resnet50", "weights": "pretrained", "embedding_dim": 512}
CONFIG |= {"image_size": None, "freeze_batchnorm": False, "swap": True}
CONFIG |= {"num_clusters": "auto", "images_per_cluster": 4, "batch_size": 32}
CONFIG |= {"epochs": 20, "warmup_epochs": 2, "learning_rate": 1e-4, "checkpoint_every": 1000}
CONFIG["loss_weights"] = {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0}


def main() -> None:
    parser = flags.training_parser(__doc__, CONFIG)
    parser.add_argument("images", type=Path, help="folder of pictures, searched to its depth")
    parser.add_argument("--eval-folder", type=Path, help="to test on: its sub-folders are classes")
    args = parser.parse_args()
    # An earlier run stays untouched until run.open: by then the arguments are found good.
    begin = {"resume": args.resume, "overwrite": args.overwrite}
    run = TrainingRun(args.run, apart_from=[args.images, args.eval_folder], **begin)
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kept = {"freeze_batchnorm": args.freeze_batchnorm}
    model = pml_tacl.AttentionEmbedder(
        args.backbone,
        False if run.begun else args.weights,
        embedding_dim=args.embedding_dim,
        **kept,
    ).to(device, memory_format=torch.channels_last)
    size = (args.image_size,) * 2 if args.image_size else model.data_config["input_size"][1:]
    plain = model.transform(image_size=size)
    pictures = on_first(lambda: ImageFiles(args.images, strict=args.strict), "reading the pictures")
    labelled = args.eval_folder and on_first(
        lambda: images_to_test_on(args.eval_folder, pictures, plain), "reading the test"
    )
    auto = max(2, min(len(pictures) // 10, 10_000), args.batch_size // args.images_per_cluster)
    clusters = auto if args.num_clusters == "auto" else args.num_clusters
    views = pml_tacl.SiameseTransform.for_model(model, size)
    groups = model.parameter_groups(args.learning_rate, head_lr=10 * args.learning_rate)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    trainer = pml_tacl.UnsupervisedTrainer(
        model, optimizer, args.batch_size, losses, pictures, transform=views, eval_transform=plain,
        labeler=pml_tacl.KMeansPseudoLabeler(clusters, seed=args.seed),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=args.images_per_cluster, warmup_epochs=args.warmup_epochs,
        swap=pml_tacl.BackgroundSwap(cell_offset=views.cell_offset) if args.swap else None,
        loss_weights=args.loss_weights, checkpoint_every=args.checkpoint_every,
        dataloader_num_workers=args.workers,
    )  # fmt: skip
    steps = args.epochs * trainer.iterations_per_epoch + 1
    schedule = OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    trainer.lr_schedulers["trunk_scheduler_by_iteration"] = schedule
    seen = pictures.with_transform(plain)
    if not run.begun:  # where the projection starts
        shuffled = DataLoader(seen, 64, shuffle=True, num_workers=args.workers)
        model.fit_projection(shuffled, progress=is_first())

    def measure(epoch: int) -> dict[str, float]:
        return evaluate_together(model, labelled, num_workers=args.workers) if labelled else {}

    config = {**flags.settings_of(args), "image_size": size, "num_clusters": clusters}
    for name, files in (("pictures", pictures), ("eval_pictures", labelled)):
        if files:  # the same ones may lie elsewhere when a run goes on
            digest = partial(runs.digest_of, files.names, files.paths)
            config[name] = on_first(digest, "reading the pictures")
    run.open(config, free=("epochs", "images", "eval_folder", "weights"))
    rows = run.train(trainer, args.epochs, measure)
    found = embed_together(model, seen, num_workers=args.workers)
    if is_first():
        PictureIndex(found[0], pictures.names, pictures.root).save(run.folder)
        run.draw(model, seen, found[0])
        if labelled:
            print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {args.eval_folder}")
        print(f"\n{len(pictures)} pictures indexed: python examples/search.py {args.run} QUERY")


if __name__ == "__main__":
    with session(), runs.one_line_errors():
        main()
