"""Train on a folder of images without labels in three lines, and search it.

    python examples/folder_trainer.py

Set FOLDER to the folder of your images. The script writes the model and an index to RUN, and prints
whether training helped.
"""

from pml_tacl import AttentionEmbedder, UnsupervisedTrainer
from pml_tacl.datasets import load_rgb
from pml_tacl.search import ImageIndex

FOLDER = "photos"
RUN = "runs/folder_trainer"
BACKBONE = "resnet50"
WEIGHTS = True  # ImageNet weights, through timm; or the path of a file
IMAGE_SIZE = 224
EPOCHS = 10

# Train
model = AttentionEmbedder(BACKBONE, pretrained=WEIGHTS)
trainer = UnsupervisedTrainer(model, dataset=FOLDER, image_size=IMAGE_SIZE, run=RUN)
trainer.train(num_epochs=EPOCHS)

# Search with an image; here the first one of the folder
index = ImageIndex.load(RUN)
query = load_rgb(index.paths([0])[0])
device = next(model.parameters()).device
images = model.transform(image_size=IMAGE_SIZE)(query)[None].to(device)
similarities, rows = index.search(model.eval()(images).detach(), k=5)
for similarity, path in zip(similarities[0], index.paths(rows[0]), strict=True):
    print(f"{similarity:.3f}  {path}")
