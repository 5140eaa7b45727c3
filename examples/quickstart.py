"""Train on images of characters without labels, then retrieve unseen characters.

    python examples/quickstart.py

The script writes to runs/quickstart/: metrics.json, curves of losses and recall, attention
overlays, a retrieval gallery and the records of record-keeper. It uses a GPU if there is one.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import pml_tacl
from pml_tacl.cli import flags
from pml_tacl.cli import run_folder as runs
from pml_tacl.cli.training_run import TrainingRun
from pml_tacl.datasets import Glyphs
from pml_tacl.evaluation import embed, make_tester

MODEL = {"backbone": "resnet10t", "embedding_dim": 128, "pooling": "covariance"}  # a small ResNet
MODEL |= {"channels": [32, 64, 128, 256], "stem_width": 16, "output_stride": 16}
MODEL["feature_index"] = 2  # the stage for attention: 8 x 8 cells at 64 pixels
CONFIG = {"run": "runs/quickstart", "seed": 0}  # defaults of the flags, see --help
CONFIG |= {"num_clusters": "auto", "batch_size": 64, "images_per_cluster": 4}  # auto: images / 10
CONFIG |= {"epochs": 6, "learning_rate": 5e-3}
CONFIG["warmup_epochs"] = 3  # each image is its own cluster until features are good enough
CONFIG["loss_weights"] = {"metric_loss": 1.0, "clustering_loss": 0.5, "attention_loss": 3.0}


def main() -> None:
    parser = flags.training_parser(__doc__, CONFIG)
    parser.add_argument("--amp", choices=["bfloat16"], help="mixed precision")
    args = parser.parse_args()
    run = TrainingRun(args.run, resume=args.resume, overwrite=args.overwrite)
    runs.seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Different characters; the labels of train are not used.
    train, test = Glyphs("train"), Glyphs("test")
    for half in (train, test):
        half.preload()
    model = pml_tacl.AttentionEmbedder(**MODEL)
    model = model.to(device, memory_format=torch.channels_last)
    train.transform = test.transform = model.transform(image_size=64)
    if not run.begun:
        model.fit_projection(DataLoader(train, 128))  # initial projection
    train.transform = None
    colours = [v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5)], 0.9), v2.RandomChannelPermutation()]
    colours += [v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(3, (0.1, 1.5))], 0.3)]
    affine = v2.RandomAffine(15, (0.08, 0.08), scale=(0.7, 1.4), shear=10, fill=220)
    views = {"crop_scale": (0.6, 1), "geometric": affine, "photometric": v2.Compose(colours)}
    views["flip"] = False  # a mirrored letter is not the same letter
    losses = {
        "metric_loss": MultiSimilarityLoss(),
        "clustering_loss": pml_tacl.ContrastiveClusteringLoss(),
        "attention_loss": pml_tacl.AttentionConsistencyLoss(),
    }
    calculator = pml_tacl.RetrievalCalculator(exclude=("AMI",))

    def measure(epoch: int) -> dict[str, float]:
        tester = make_tester(calculator, end_of_testing_hook=run.hooks.end_of_testing_hook)
        found = tester.test({"test": test}, epoch, model.trunk, model.embedder)["test"]
        return {k.removesuffix("_level0"): v for k, v in found.items() if k != "epoch"}

    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=1e-2)
    trainer = pml_tacl.UnsupervisedTrainer(
        model,
        optimizer,
        args.batch_size,
        losses,
        train,
        transform=pml_tacl.SiameseTransform.for_model(model, 64, **views),
        eval_transform=test.transform,
        dataloader_num_workers=1,
        labeler=pml_tacl.KMeansPseudoLabeler(args.num_clusters, seed=args.seed),
        mining_funcs={"attention_miner": pml_tacl.AttentionConsistencyMiner()},
        images_per_cluster=args.images_per_cluster,
        warmup_epochs=args.warmup_epochs,
        loss_weights=args.loss_weights,
        amp_dtype=args.amp and getattr(torch, args.amp),
    )
    steps = args.epochs * trainer.iterations_per_epoch + 1
    schedule = OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    trainer.lr_schedulers["trunk_scheduler_by_iteration"] = schedule
    labels = torch.from_numpy(test.labels)
    pixels = normalize(torch.from_numpy(test.images).flatten(1).float(), dim=1)
    rows = {"raw_pixels": calculator.get_accuracy(pixels, labels)}
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # leave one core to the loader
    run.open(MODEL | flags.settings_of(args))  # run.open() may delete an earlier run
    also = {"test_epochs": [args.warmup_epochs], "rows": rows}
    rows = run.train(trainer, args.epochs, measure, **also)
    run.draw(model, test, embed(model, test)[0], labels, title="characters never seen")
    print(f"\n{runs.metrics_table(rows)}\n\nper cent, on {len(test.classes)} unseen characters")
    print(f"images, metrics and model: {args.run}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
