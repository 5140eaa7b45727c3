"""The benchmarks' folders as they are published, with a few images of one's own."""

from pathlib import Path

from PIL import Image


def grey(class_id: int) -> Image.Image:
    """An image of mode L, as CUB and Cars hold some, whose level is the class."""
    return Image.new("L", (12, 8), class_id % 256)


def make_cub(root: Path, classes, draw=grey) -> None:
    """Classes of images 1, 2, ..."""
    base = root / "CUB_200_2011"
    lines = [(i, f"{c:03}.Bird/{i}.jpg", c) for i, c in enumerate(classes, start=1)]
    for _, name, c in lines:
        (base / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(c).save(base / "images" / name)
    (base / "images.txt").write_text("".join(f"{i} {name}\n" for i, name, _ in lines))
    (base / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, _, c in lines))


def make_cars(root: Path, classes, draw=grey) -> None:
    """Classes of the images of each of the two annotation files."""
    root.joinpath("names.csv").write_text("".join(f"Car S/V {i}\n" for i in range(1, 197)))
    for split in ("train", "test"):
        lines = []
        for i, c in enumerate(classes):
            path = root / "car_data/car_data" / split / f"Car S-V {c}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(c).save(path)
            lines.append(f"{path.name},1,2,3,4,{c}\n")
        root.joinpath(f"anno_{split}.csv").write_text("".join(lines))


def make_sop(root: Path, classes_of, draw=grey) -> None:
    """Classes of the images of each split."""
    base = root / "Stanford_Online_Products"
    (base / "chair_final").mkdir(parents=True)
    for split, classes in classes_of.items():
        lines = ["image_id class_id super_class_id path\n"]
        for i, c in enumerate(classes):
            name = f"chair_final/{split}_{i}.JPG"
            draw(c).save(base / name)
            lines.append(f"{i + 1} {c} 1 {name}\n")
        (base / f"Ebay_{split}.txt").write_text("".join(lines))


def make_inshop(root: Path, rows, images="Img", draw=grey) -> None:
    """Rows of (item, part)."""
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    for i, (item, part) in enumerate(rows):
        name = f"img/WOMEN/Blouses_Shirts/id_{item:08}/{i:02}_1_front.jpg"
        (root / images / name).parent.mkdir(parents=True, exist_ok=True)
        draw(item).save(root / images / name)
        lines.append(f"{name}    id_{item:08}  {part}")
    (root / "Eval").mkdir()
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
