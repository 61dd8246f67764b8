"""ImageNet in each of its forms: class folders, class tars, the tar of tars, and the validation images."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_prep import imagenet
from tests.shards import image_bytes, read_samples, tar_bytes

SYNSETS = ("n01440764", "n01443537", "n02102040")
FILES = [(synset, f"{synset}_{i}.JPEG", image_bytes(10 * c + i)) for c, synset in enumerate(SYNSETS) for i in range(4)]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def class_tar(synset: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _, name, data in (file for file in FILES if file[0] == synset):
            add(tar, name, data)
    return buffer.getvalue()


@pytest.fixture
def train(tmp_path: Path) -> Path:
    for synset, name, data in FILES:
        (tmp_path / "train" / synset).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / synset / name).write_bytes(data)
    return tmp_path / "train"


@pytest.fixture
def names(tmp_path: Path) -> Path:
    file = tmp_path / "LOC_synset_mapping.txt"
    words = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish", "n01484850": "shark", "n02102040": "springer"}
    file.write_text("".join(f"{synset} {name}\n" for synset, name in words.items()))
    return file


def prepare(images: Path, out: Path, *options: str) -> int:
    wanted = ["--images", str(images), "--out", str(out), "--workers", "1", "--samples-per-shard", "5", "--size", "16"]
    return imagenet.main([*wanted, *options])


def test_class_folders(train: Path, names: Path, tmp_path: Path) -> None:
    (train / "n01440764" / "broken.JPEG").write_bytes(b"no image")
    assert prepare(train, tmp_path / "out", "--names", str(names)) == 0
    samples = read_samples(tmp_path / "out")
    assert {s["__key__"] for s in samples} == {Path(name).stem for _, name, _ in FILES}
    assert [s["__key__"] for s in samples] != sorted(s["__key__"] for s in samples)  # classes are mixed
    for sample in samples:
        synset = sample["__key__"].split("_")[0]
        assert int(sample["cls"]) == {"n01440764": 0, "n01443537": 1, "n02102040": 3}[synset]
        assert json.loads(sample["json"])["synset"] == synset
    assert json.loads(samples[0]["json"])["name"] in names.read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["left out"] == {"undecodable images": 1}


def test_every_form_gives_the_same_shards(train: Path, tmp_path: Path) -> None:
    assert prepare(train, tmp_path / "folders") == 0
    tars = tmp_path / "tars"
    tars.mkdir()
    for synset in SYNSETS:
        (tars / f"{synset}.tar").write_bytes(class_tar(synset))
    assert prepare(tars, tmp_path / "from_tars") == 0
    outer = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer, "w") as tar:
        for synset in SYNSETS:
            add(tar, f"{synset}.tar", class_tar(synset))
    assert prepare(outer, tmp_path / "from_outer") == 0
    samples = {
        name: [(s["__key__"], s["jpg"], s["cls"]) for s in read_samples(tmp_path / name)]
        for name in ("folders", "from_tars", "from_outer")
    }
    assert samples["folders"] == samples["from_tars"] == samples["from_outer"]
    assert tar_bytes(tmp_path / "from_tars") == tar_bytes(tmp_path / "from_outer")


def test_cut_and_hostile_tars(train: Path, tmp_path: Path) -> None:
    outer = tmp_path / "train.tar"
    with tarfile.open(outer, "w") as tar:
        add(tar, "n01440764.tar", class_tar("n01440764"))
        add(tar, "n01443537.tar", b"\xff" * 2048)
        link = tarfile.TarInfo("n02102040.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "../n02102041.tar", class_tar("n01443537")[:3000])
    assert prepare(outer, tmp_path / "out") == 0
    keys = [sample["__key__"] for sample in read_samples(tmp_path / "out")]
    assert sorted(key for key in keys if key.startswith("n01440764")) == [f"n01440764_{i}" for i in range(4)]
    left_out = json.loads((tmp_path / "out" / "report.json").read_text())["left out"]
    assert left_out["damaged archives"] >= 1


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("labels", ["kaggle", "synsets"])
def test_validation(tmp_path: Path, form: str, labels: str) -> None:
    images = [(f"ILSVRC2012_val_{i:08d}.JPEG", image_bytes(i), SYNSETS[i % 3]) for i in range(1, 5)]
    place = tmp_path / "val"
    if form == "folder":
        place.mkdir()
        for name, data, _ in images:
            (place / name).write_bytes(data)
    else:
        with tarfile.open(place, "w") as tar:
            for name, data, _ in reversed(images):
                add(tar, name, data)
    file = tmp_path / "labels"
    if labels == "kaggle":
        lines = [f"{Path(name).stem},{synset} 1 2 3 4" for name, _, synset in reversed(images)]
        file.write_text("\n".join(["ImageId,PredictionString", *lines]))
    else:
        file.write_text("\n".join(synset for _, _, synset in images))
    assert prepare(place, tmp_path / "out", "--val-labels", str(file)) == 0
    found = {sample["__key__"]: int(sample["cls"]) for sample in read_samples(tmp_path / "out")}
    assert found == {Path(name).stem: SYNSETS.index(synset) for name, _, synset in images}


def test_bad_arguments_are_refused_before_writing(train: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    with pytest.raises(ValueError, match="--images absent: it does not exist"):
        prepare(Path("absent"), out)
    with pytest.raises(ValueError, match="no images in folders or tars named by class"):
        prepare(train / "n01440764", out)
    file.write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="--names: it lacks n01443537, n02102040"):
        prepare(train, out, "--names", str(file))
    file.write_text("490\n361\n")
    with pytest.raises(ValueError, match="numbers are not accepted"):
        prepare(train / "n01440764", out, "--val-labels", str(file))
    assert not out.exists()
