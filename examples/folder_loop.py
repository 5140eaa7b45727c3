"""Train on a folder of images without labels, in a plain PyTorch loop: model, data, losses, loop.

    python examples/folder_loop.py

Set FOLDER to the folder of your images. The script writes the model and an index, and prints the
images most similar to the first one.
"""

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import DataLoader, StackDataset

import pml_tacl
from pml_tacl.datasets import ImageFiles
from pml_tacl.evaluation import embed
from pml_tacl.search import ImageIndex

FOLDER = "photos"
RUN = "runs/folder_loop"
BACKBONE = "resnet50"
WEIGHTS = True  # ImageNet weights, through timm; or the path of a file
IMAGE_SIZE = 224
EPOCHS = 5
BATCH_SIZE = 64
IMAGES_PER_CLUSTER = 4
LEARNING_RATE = 2e-4

# Model
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = pml_tacl.AttentionEmbedder(BACKBONE, pretrained=WEIGHTS).to(device)

# Data: two views of each image for training, and the plain images for embedding
views = ImageFiles(FOLDER, transform=pml_tacl.SiameseTransform.for_model(model, IMAGE_SIZE))
plain = views.with_transform(model.transform(image_size=IMAGE_SIZE))

# Losses
similarity = MultiSimilarityLoss()
clustering = pml_tacl.ContrastiveClusteringLoss()
attention = pml_tacl.AttentionConsistencyLoss(temperature=0.3)
miner = pml_tacl.AttentionConsistencyMiner()
num_clusters = max(len(plain) // 10, BATCH_SIZE // IMAGES_PER_CLUSTER)
labeler = pml_tacl.KMeansPseudoLabeler(num_clusters)
optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)

# Loop
centroids = None
for epoch in range(1, EPOCHS + 1):
    # Cluster all images; the clusters are the labels in this epoch.
    labels, centroids, _ = labeler(embed(model, plain)[0], centroids)
    clustering.set_centroids(centroids.to(device))
    sampler = MPerClassSampler(labels, IMAGES_PER_CLUSTER, BATCH_SIZE, len(plain))
    loader = DataLoader(StackDataset(views, labels), BATCH_SIZE, sampler=sampler, drop_last=True)
    model.train()
    for ((first, second, points), _), y in loader:
        out = model.forward_features(torch.cat([first, second]).to(device))
        first_maps, second_maps = out.feature_maps.chunk(2)
        y = y.to(device)
        labels_of_both = y.repeat(2)
        pairs = miner(first_maps, y)
        loss = similarity(out.embeddings, labels_of_both)
        loss = loss + 0.5 * clustering(out.embeddings, labels_of_both)
        loss = loss + 3 * attention(first_maps, second_maps, points.to(device), y, pairs)
        optimizer.zero_grad()
        loss.backward()
        clustering.move_centroids(out.embeddings, labels_of_both)
        optimizer.step()
    print(f"epoch {epoch} of {EPOCHS}, last loss {loss.item():.3f}")

# Search: fit the projection without labels, then build an index
model.fit_projection(DataLoader(plain, BATCH_SIZE, shuffle=True))
embeddings, _ = embed(model, plain)
model.save_pretrained(f"{RUN}/model")
index = ImageIndex.of(plain, embeddings)
index.save(RUN)
similarities, rows = index.search(embeddings[:1], k=5)
for similarity_of_row, path in zip(similarities[0], index.paths(rows[0]), strict=True):
    print(f"{similarity_of_row:.3f}  {path}")
