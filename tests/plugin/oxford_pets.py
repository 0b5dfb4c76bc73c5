"""Oxford-IIIT Pet (robots.ox.ac.uk/~vgg/data/pets): photos and trimaps, read by segbatch through an entry point."""

import json
from dataclasses import replace

from segbatch.datasets import reading
from segbatch.datasets.base import Dataset
from segbatch.records import ClassInfo, ClassTable, PlanItem

CLASSES = ClassTable((ClassInfo(1, "pet"), ClassInfo(2, "background"), ClassInfo(3, "border", ignore=True)))
KNOWN = reading.known_ids(CLASSES)


class OxfordPets(Dataset):
    """Oxford-IIIT Pet: images/NAME.jpg, annotations/trimaps/NAME.png, annotations/trainval.txt and test.txt."""

    name = "oxford-pets"
    tasks = ("semantic",)
    official_splits = ("trainval", "test")

    def recognises(self, tree):
        return tree.is_folder("annotations/trimaps")

    def classes(self, tree):
        return CLASSES

    def splits(self, tree):
        return tuple(s for s in self.official_splits if tree.exists(f"annotations/{s}.txt"))

    def items(self, tree, splits):
        photos, maps = dict(tree.files("images")), dict(tree.files("annotations/trimaps"))
        for split in reading.choose_splits(self.name, tree.source, self.splits(tree), splits):
            for line in tree.read_lines(f"annotations/{split}.txt"):
                name = line.split()[0]
                photo, trimap = photos.get(f"{name}.jpg"), maps.get(f"{name}.png")
                uri = photo.uri if photo else tree.uri(f"images/{name}.jpg")
                label = trimap.uri if trimap else tree.uri(f"annotations/trimaps/{name}.png")
                etag, size = reading.joint_etag(photo, trimap), sum(i.size for i in (photo, trimap) if i)
                yield PlanItem(name, uri, etag, size, detail=json.dumps({"label": label}), split=split)

    def read(self, item):
        data, info = reading.read_photo(item.uri)
        label_uri = reading.detail_of(item)["label"]
        trimap = reading.read_label(label_uri)
        reading.check_size(trimap, info, label_uri, item.uri)
        reading.check_ids(trimap, KNOWN, label_uri)
        yield replace(reading.sample_of(item, data, info), semantic=trimap)
