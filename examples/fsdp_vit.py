"""Train a vision transformer that does not fit on one GPU: shard it with torch's `fully_shard`.

    torchrun --nproc-per-node 4 examples/fsdp_vit.py

Set FOLDER to the folder of your images. Each process holds a share of the weights, gradients and
optimizer state. A transformer block is gathered when it is used, and its gradients are reduced
while the backward pass goes on. The losses see the batch of all processes. The main process
writes the model and an index. Without a GPU the script runs on CPUs.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, StackDataset, Subset

import pml_tacl
from pml_tacl.datasets import ImageFiles
from pml_tacl.distributed.collectives import broadcast, gather_batch
from pml_tacl.distributed.inference import embed_distributed
from pml_tacl.distributed.session import device, is_main, rank, session, world_size
from pml_tacl.search import ImageIndex

FOLDER = "photos"
RUN = "runs/fsdp_vit"
BACKBONE = "vit_large_patch14_dinov2"
WEIGHTS = True  # pretrained weights, through timm; or the path of a file
IMAGE_SIZE = 224
ROUNDS = 5  # each begins with a clustering
STEPS = 100  # of a round
BATCH_SIZE = 64  # of each process; its images come in two views
IMAGES_PER_CLUSTER = 4
LEARNING_RATE = 3e-5
WORKERS = 4  # of each process, to compute the views


def draw_batches(labels, generator):
    """Return the images of each step: some of each of some clusters."""
    clusters = [torch.where(labels == label)[0] for label in labels.unique()]
    batches = []
    for _ in range(STEPS):
        picked = torch.randperm(len(clusters), generator=generator)
        members = [clusters[i] for i in picked[: BATCH_SIZE // IMAGES_PER_CLUSTER]]
        size = (IMAGES_PER_CLUSTER,)
        draws = [torch.randint(len(m), size, generator=generator) for m in members]
        batches.append([int(i) for m, draw in zip(members, draws, strict=True) for i in m[draw]])
    return batches


with session():
    # Model: shard each block, then what is left
    torch.manual_seed(0)
    model = pml_tacl.AttentionEmbedder(BACKBONE, pretrained=WEIGHTS).to(device())
    two_views = pml_tacl.SiameseTransform.for_model(model, IMAGE_SIZE)
    views = ImageFiles(FOLDER, transform=two_views)
    plain = views.with_transform(model.transform(image_size=IMAGE_SIZE))
    for block in model.trunk.model.blocks:
        fully_shard(block)
    fully_shard(model.trunk)

    # Losses
    similarity = MultiSimilarityLoss()
    clustering = pml_tacl.ContrastiveClusteringLoss()
    attention = pml_tacl.AttentionConsistencyLoss(temperature=0.3)
    miner = pml_tacl.AttentionConsistencyMiner()
    labeler = pml_tacl.KMeansPseudoLabeler("auto")
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

    # A sharded model computes on all processes at once, so all embed equally many batches.
    whole = world_size() * BATCH_SIZE
    padded = Subset(plain, [i % len(plain) for i in range(-(-len(plain) // whole) * whole)])

    # Loop
    generator = torch.Generator().manual_seed(rank())  # each process draws its own images
    labels = centroids = None
    for round_ in range(1, ROUNDS + 1):
        # Cluster all images on the main process; the clusters are the labels of this round.
        found = embed_distributed(model, padded, batch_size=BATCH_SIZE)
        if found is not None:
            labels, centroids, _ = labeler(found[0][: len(plain)], centroids)
        labels, centroids = broadcast([labels, centroids])
        clustering.set_centroids(centroids.to(device()))
        batches = draw_batches(labels, generator)
        data = StackDataset(views, labels)
        loader = DataLoader(data, batch_sampler=batches, num_workers=WORKERS)
        model.train()
        for ((first, second, points), _), y in loader:
            out = model.forward_features(torch.cat([first, second]).to(device()))
            y = y.to(device())
            embeddings = gather_batch(out.embeddings, views=2)  # of all processes
            both = gather_batch(y).repeat(2)
            loss = similarity(embeddings, both) + 0.5 * clustering(embeddings, both)
            first_maps, second_maps = out.feature_maps.chunk(2)
            pairs = miner(first_maps, y)
            own = 3 * attention(first_maps, second_maps, points.to(device()), y, pairs)
            # FSDP averages gradients, but those of the gathered loss must be summed.
            (world_size() * loss + own).backward()
            optimizer.step()
            optimizer.zero_grad()
        if is_main():
            print(f"round {round_} of {ROUNDS}, last loss {(loss + own).item():.3f}")

    # Search: the main process takes the whole weights, fits the projection and builds an index
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if is_main():
        model = pml_tacl.AttentionEmbedder(BACKBONE, pretrained=WEIGHTS)
        model.load_state_dict(state)
        model = model.to(device())
        model.fit_projection(DataLoader(plain, BATCH_SIZE, shuffle=True))
        model.save_pretrained(f"{RUN}/model")
        ImageIndex.of(plain, pml_tacl.evaluation.embed(model, plain)[0]).save(RUN)
        print(f"{RUN} holds the model and an index of {len(plain)} images")
