"Every loader on tiny files of the real formats, and what each says of a file that is broken."
import gzip, hashlib, os, pickle, subprocess, sys, tarfile, warnings
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from torchvision import datasets

from bnonly import data, readers
from bnonly.archives import BrokenData, tree_files
from bnonly.cache import cache_files
from bnonly.data import Batches, FileBatches, Images, affine, draws, load_data, loaders, normalize
from bnonly.experiment import DATASETS
from bnonly.readers import CIFAR10

pytestmark = pytest.mark.filterwarnings("ignore:.*holds .* where (CIFAR-10|MNIST) has")


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path_factory):
    "No test reads or writes the user's own files, and none downloads."
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("BNONLY_DATA", "BNONLY_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data, "downloads", list)
    monkeypatch.setattr(data, "CIFAR10_SIZE", (20, 20))   # what make_tree gives


def image(seed, size=(32, 32)): return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def encoded(pixels, suffix):
    file = BytesIO()
    Image.fromarray(pixels).save(file, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return file.getvalue()


@pytest.fixture
def tree(tmp_path): return make_tree(tmp_path)


def make_tree(folder, suffix="png", per_class=2):
    "fastai's layout, a few images a class."
    for k, part in enumerate(("train", "test")):
        for y, c in enumerate(CIFAR10):
            (folder/"cifar10"/part/c).mkdir(parents=True)
            for i in range(per_class):
                (folder/"cifar10"/part/c/f"{i}_{c}.{suffix}").write_bytes(encoded(image((k, y, i)), suffix))
    (folder/"cifar10"/"labels.txt").write_text("\n".join(CIFAR10) + "\n")
    return folder


def pack(folder, target=None):
    "The tree of a folder as fastai's archive."
    target = target or folder
    with tarfile.open(target/"cifar10.tgz", "w:gz") as tar: tar.add(folder/"cifar10", "cifar10")
    return target/"cifar10.tgz"


def refuses(name, folder, *parts, kind=BrokenData):
    "Loading fails with one line that holds all `parts`."
    with pytest.raises(kind) as e: load_data(name, folder)
    assert "\n" not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)


# -------- digits and batches

def test_import_is_light():
    heavy = "fastai", "sklearn", "torchvision", "matplotlib"
    code = f"import sys, bnonly.data; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_digits_are_always_the_same():
    d = load_data("digits")
    assert d.digest == "a98b5faeefd195fc"
    assert d.train.x.shape == (1437, 8, 8, 1) and d.test.x.shape == (360, 8, 8, 1) and d.train.x.dtype == torch.uint8
    assert int(d.train.x.max()) == 255


def noise(n=10, size=8, channels=3, pad=2, flip=True):
    g = torch.Generator().manual_seed(0)
    images = Images(torch.randint(256, (n, size, size, channels), generator=g, dtype=torch.uint8), torch.arange(n) % 10)
    return data.describe("noise", "noise", images, images, "0123456789", pad=pad, flip=flip)


def pixels(d, x): return ((x.permute(0, 2, 3, 1)*torch.tensor(d.std) + torch.tensor(d.mean))*255).round().byte()


def test_images_that_are_neither_cropped_nor_mirrored_come_in_the_order_of_the_epoch():
    data = replace(load_data("digits"), pad=0, flip=False)
    order = draws(len(data.train), 0, False, 3, 0)[0]
    x, y = next(iter(loaders(data, 64, seed=3)[0]))
    assert torch.equal(y, data.train.y[order[:64]])
    assert torch.equal(x, normalize(data.train.x[order[:64]], *affine(data, 8*8, "cpu")))


def test_every_training_image_is_a_crop_of_its_own():
    d = noise(n=40)
    x, y = next(iter(Batches(d.train, d, 40, train=True, seed=1)))
    order, corner, mirror = data.draws(40, 2, True, 1, 0)
    padded = np.pad(d.train.x.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    for got, i in zip(pixels(d, x).numpy(), order.tolist()):
        top, left = corner[i].tolist()
        expected = padded[i, top:top+8, left:left+8]
        assert (got == (expected[:, ::-1] if mirror[i] else expected)).all()
    assert (y == d.train.y[order]).all()


def test_corners_and_mirrors_are_uniform():
    _, corner, mirror = data.draws(90_000, 4, True, 0, 0)
    counts = (corner[:, 0]*9 + corner[:, 1]).bincount(minlength=81)
    assert abs(counts - 90_000/81).max() < 5*(90_000/81)**.5
    assert abs(mirror.double().mean() - .5) < .01


def test_epochs_follow_from_seed_and_number_alone():
    d = noise()
    def epoch(seed, number, size=4):
        b = Batches(d.train, d, size, train=True, seed=seed)
        b.epoch = number
        return torch.cat([x for x, _ in b])
    counted = Batches(d.train, d, 4, train=True)
    assert [torch.cat([x for x, _ in counted]) for _ in range(3)][2].equal(epoch(0, 2))
    assert epoch(0, 2).equal(epoch(0, 2, size=10))
    assert not epoch(0, 2).equal(epoch(0, 3)) and not epoch(0, 2).equal(epoch(1, 2))


def test_the_global_random_state_is_left_alone():
    d = noise()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Batches(d.train, d, 4, train=True))
    assert torch.get_rng_state().equal(before)


def test_test_batches_are_plain_and_whole():
    d = noise(n=10)
    batches = Batches(d.test, d, 4)
    assert len(batches) == 3 and [len(y) for _, y in batches] == [4, 4, 2]
    assert pixels(d, torch.cat([x for x, _ in batches])).equal(d.test.x)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in batches)


@pytest.mark.parametrize("labels", ([0, 10], [-1, 0]))
def test_labels_must_name_a_class(labels):
    with pytest.raises(BrokenData, match="here.npy has the label"):
        data.split(np.zeros((2, 4, 4, 1), np.uint8), labels, 10, "here.npy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_images():
    d = noise()
    (a, ya), (b, yb) = (next(iter(Batches(d.train, d, 10, train=True, device=o))) for o in ("cpu", "cuda"))
    assert torch.allclose(a, b.cpu(), atol=1e-5) and ya.equal(yb.cpu()) and b.device.type == "cuda"


# -------- CIFAR-10

def test_tree_and_archive_are_one_data_set(tree, tmp_path_factory):
    other = tmp_path_factory.mktemp("archive")
    pack(tree, other)
    a, b = load_data("cifar10", tree), load_data("cifar10", other)
    assert a.digest == b.digest and a.label == b.label == "CIFAR-10" and a.classes == CIFAR10
    assert (a.pad, a.flip, a.in_channels, a.num_classes) == (4, True, 3, 10)
    assert a.train.y.tolist() == [c for c in range(10) for _ in range(2)]
    assert (a.train.x[3].numpy() == image((0, 1, 1))).all() and (a.test.x[0].numpy() == image((1, 0, 0))).all()


def test_jpeg_is_called_jpeg(tmp_path):
    assert load_data("cifar10", make_tree(tmp_path, "jpg")).label == "CIFAR-10 (JPEG)"


def test_bnonly_data_names_the_folder(tree, monkeypatch):
    monkeypatch.setenv("BNONLY_DATA", str(tree))
    assert len(load_data("cifar10").train) == 20


@pytest.mark.parametrize("share", (.02, .5, .99))
def test_truncated_archive(tree, tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    whole = pack(tree, folder)
    whole.write_bytes(whole.read_bytes()[:int(share*whole.stat().st_size)])
    refuses("cifar10", folder, str(whole), "cut off", "replace it")
    assert not (folder/"cache").exists()


def test_damaged_archive(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    archive = pack(tree, folder)
    content = bytearray(archive.read_bytes())
    content[len(content)//2] ^= 0xff
    archive.write_bytes(content)
    refuses("cifar10", folder, str(archive))


def test_archive_that_is_none(tmp_path):
    (tmp_path/"cifar10.tgz").write_text("<html>404</html>")
    refuses("cifar10", tmp_path, "cifar10.tgz", "cut off or damaged")


@pytest.mark.parametrize("archived", (False, True))
@pytest.mark.parametrize("part", ("train", "test"))
def test_missing_class_folder(tree, part, archived, tmp_path_factory):
    for f in (tree/"cifar10"/part/"horse").iterdir(): f.unlink()
    (tree/"cifar10"/part/"horse").rmdir()
    folder = tmp_path_factory.mktemp("archive") if archived else tree
    if archived: pack(tree, folder)
    refuses("cifar10", folder, f"no images in {part}/horse", "cifar10.tgz" if archived else "cifar10 ")


def test_unknown_class_folder(tree):
    (tree/"cifar10"/"train"/"cat").rename(tree/"cifar10"/"train"/"unicorn")
    refuses("cifar10", tree, "train/unicorn is not a class")


def test_labels_in_another_order(tree):
    (tree/"cifar10"/"labels.txt").write_text("\n".join(CIFAR10[::-1]))
    refuses("cifar10", tree, "labels.txt", "order")


def test_undecodable_image(tree):
    file = tree/"cifar10"/"train"/"dog"/"0_dog.png"
    file.write_bytes(file.read_bytes()[:200])
    refuses("cifar10", tree, "train/dog/0_dog.png cannot be decoded")


def test_image_of_another_size(tree):
    Image.fromarray(image(0, (30, 30))).save(tree/"cifar10"/"test"/"dog"/"0_dog.png")
    refuses("cifar10", tree, "test/dog/0_dog.png differs in size")


def test_other_files_do_not_matter(tree):
    before = load_data("cifar10", tree).digest
    (tree/"cache"/"cifar10.safetensors").unlink()
    for name in ("._0_dog.png", "notes.txt"): (tree/"cifar10"/"train"/"dog"/name).write_bytes(b"no image")
    assert load_data("cifar10", tree).digest == before


# -------- torchvision's batches

class Trap:
    "A pickle that leaves a mark when it is opened."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)


@pytest.fixture
def batches(tmp_path, monkeypatch):
    "Tiny pickles of torchvision's form, with their checksums in place of the published ones."
    folder = tmp_path/"cifar-10-batches-py"
    folder.mkdir()
    def save(name, value):
        content = pickle.dumps(value)
        (folder/name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def batch(k):
        return dict(
            data=np.stack([image((k, y)).transpose(2, 0, 1).ravel() for y in range(10)]), labels=list(range(10))
        )
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [save(f"data_batch_{k}", batch(k)) for k in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [save("test_batch", batch(6))])
    name, md5 = save("batches.meta", dict(label_names=list(CIFAR10)))
    monkeypatch.setattr(datasets.CIFAR10, "meta", dict(filename=name, key="label_names", md5=md5))
    return tmp_path


def test_batches_are_read(batches):
    d = load_data("cifar10", batches)
    assert d.label == "CIFAR-10" and d.train.x.shape == (50, 32, 32, 3) and d.train.y.tolist() == [*range(10)]*5
    assert (d.train.x[13].numpy() == image((2, 3))).all() and (d.test.x[4].numpy() == image((6, 4))).all()


@pytest.mark.parametrize("name", ("data_batch_3", "test_batch", "batches.meta"))
def test_no_pickle_is_opened_before_its_checksum_holds(batches, name):
    mark = batches/"opened"
    (batches/"cifar-10-batches-py"/name).write_bytes(pickle.dumps(Trap(mark)))
    refuses("cifar10", batches, f"{name} does not have its published checksum", "not opened")
    assert not mark.exists()


def test_missing_batch(batches):
    (batches/"cifar-10-batches-py"/"data_batch_5").unlink()
    refuses("cifar10", batches, "data_batch_5 is missing")


def test_packed_batches(batches, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    archive = folder/"cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar: tar.add(batches/"cifar-10-batches-py", "cifar-10-batches-py")
    refuses("cifar10", folder, "cifar-10-python.tar.gz does not have its published checksum")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert load_data("cifar10", folder).digest == load_data("cifar10", batches).digest


@pytest.fixture
def binary(tmp_path_factory, monkeypatch):
    "The same images as the binary version has them, with their checksums in place of the published ones."
    folder = tmp_path_factory.mktemp("binary")/"cifar-10-batches-bin"
    folder.mkdir()
    for k, name in enumerate(readers.CIFAR10_MD5, 1):
        rows = [bytes([y]) + image((k, y)).transpose(2, 0, 1).tobytes() for y in range(10)]
        (folder/name).write_bytes(b"".join(rows))
    (folder/"batches.meta.txt").write_text("\n".join(CIFAR10))
    monkeypatch.setattr(
        readers, "CIFAR10_MD5", {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in readers.CIFAR10_MD5}
    )
    return folder


def test_the_binary_version_has_the_same_images_in_the_same_order(binary, batches):
    one, two = load_data("cifar10", binary.parent), load_data("cifar10", batches)
    assert (one.label, one.digest) == (two.label, two.digest) == ("CIFAR-10", one.digest) and one.train.x.equal(
        two.train.x
    )
    assert load_data("cifar10", binary).digest == one.digest   # the data set's own folder is taken too


@pytest.mark.parametrize("name", [*readers.CIFAR10_MD5])
def test_a_binary_file_is_held_to_its_checksum(binary, name):
    content = (binary/name).read_bytes()
    (binary/name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses("cifar10", binary.parent, f"{name} of", "published checksum", "not read")
    (binary/name).unlink()
    refuses("cifar10", binary.parent, f"has no {name}")


def test_the_binary_archive_is_read_packed(binary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    with tarfile.open(folder/"cifar-10-binary.tar.gz", "w:gz") as tar: tar.add(binary, "cifar-10-batches-bin")
    assert load_data("cifar10", folder).digest == load_data("cifar10", binary.parent).digest
    assert [f.name for f in folder.iterdir() if f.name != "cache"] == ["cifar-10-binary.tar.gz"]


def test_the_original_comes_before_a_copy(binary, tree):
    copy = load_data("cifar10", tree)
    assert (tree/"cache").exists()
    binary.rename(tree/"cifar-10-batches-bin")
    assert load_data("cifar10", tree).digest != copy.digest


def test_the_published_files_are_cifar10():
    "Where $BNONLY_DATA has the binary version: 6,000 images a class, and the first image's label."
    folder = REAL and REAL/"cifar-10-batches-bin"
    if not folder or not folder.exists(): pytest.skip("BNONLY_DATA names no folder with cifar-10-batches-bin")
    label, train, test = readers.read_binary(tree_files(folder), folder)
    assert (label, len(train.x), len(test.x), int(train.y[0]), int(test.y[0])) == ("CIFAR-10", 50_000, 10_000, 6, 3)
    assert (np.bincount(train.y) + np.bincount(test.y)).tolist() == [6000]*10


# -------- cache and download

def test_the_cache_comes_first(tree):
    one = load_data("cifar10", tree)
    (tree/"cifar10").rename(tree/"gone")
    two = load_data("cifar10", tree)
    assert all(getattr(one, f) == getattr(two, f) for f in ("label", "digest", "classes", "mean", "std", "pad", "flip"))
    assert one.test.x.equal(two.test.x)


@pytest.mark.parametrize(
    "damage",
    (
        lambda b: b[:-7],
        lambda b: b[:20],
        lambda b: b"",
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b.replace(b"(JPEG)", b"(XPEG)"),
    ),
    ids=("cut", "short", "empty", "edited", "renamed"),
)
def test_a_broken_cache_is_named_and_built_again(tmp_path, damage):
    make_tree(tmp_path, "jpg")
    one = load_data("cifar10", tmp_path)
    cache = cache_files(tmp_path, "cifar10")[0]
    cache.write_bytes(damage(cache.read_bytes()))
    with pytest.warns(UserWarning, match=f"{cache.name} is cut off or was edited"): two = load_data("cifar10", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        three = load_data("cifar10", tmp_path)
    assert (one.digest, one.label) == (two.digest, two.label) == (three.digest, three.label)


def test_incomplete_data_are_warned_of_each_time_and_never_cached(tree, monkeypatch):
    monkeypatch.setattr(data, "CIFAR10_SIZE", (50, 50))
    for _ in range(2):
        with pytest.warns(UserWarning, match="20 and 20 images where CIFAR-10 has 50 and 50"):
            assert len(load_data("cifar10", tree).train) == 20
    assert not (tree/"cache").exists()
    for f in (tree/"cifar10").glob("*/*/0_*"):
        for i in "234": (f.parent/f"{i}.png").write_bytes(f.read_bytes())
    with warnings.catch_warnings(action="error"): assert len(load_data("cifar10", tree).train) == 50


def test_a_broken_cache_without_a_source(tree):
    load_data("cifar10", tree)
    cache_files(tree, "cifar10")[0].write_bytes(b"?")
    (tree/"cifar10").rename(tree/"gone")
    with pytest.warns(UserWarning, match="cut off or was edited"):
        refuses("cifar10", tree, "no CIFAR-10", kind=FileNotFoundError)


def test_an_archive_that_was_replaced_is_read_again(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    pack(tree, folder)
    old = load_data("cifar10", folder)
    Image.fromarray(image(99)).save(tree/"cifar10"/"train"/"dog"/"0_dog.png")
    os.utime(pack(tree, folder), (1, 1))
    with pytest.warns(UserWarning, match="cifar10.tgz changed"):
        assert load_data("cifar10", folder).digest != old.digest


def test_a_folder_that_cannot_be_written_to(tree, monkeypatch):
    inside, home = cache_files(tree, "cifar10")
    (tree/"cache").write_text("in the way")
    one = load_data("cifar10", tree)
    assert home.exists() and Path.home() in home.parents and not inside.exists()
    monkeypatch.setattr(data, "SOURCES", {})
    assert load_data("cifar10", tree).digest == one.digest


def test_no_place_for_a_cache(tree):
    (tree/"cache").write_text("in the way")
    (Path.home()/".cache").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be written"): assert len(load_data("cifar10", tree).train) == 20


def test_download_takes_the_first_whole_file(tree, tmp_path_factory, monkeypatch):
    source, folder = pack(tree), tmp_path_factory.mktemp("new")/"made"/"for it"
    wrong = tree/"wrong.tgz"
    wrong.write_text("a page that says no")
    whole = lambda f: f.read_bytes() == source.read_bytes()
    monkeypatch.setattr(
        data, "downloads", lambda: [(o.as_uri(), "cifar10.tgz", whole) for o in (tree / "none.tgz", wrong, source)]
    )
    assert len(load_data("cifar10", folder).train) == 20
    assert sorted(o.name for o in folder.iterdir()) == ["cache", "cifar10.tgz"]


def test_offline_says_where_and_what(tmp_path, monkeypatch):
    addresses = ["http://127.0.0.1:9/cifar10.tgz", "http://127.0.0.1:9/cifar-10-python.tar.gz"]
    monkeypatch.setattr(data, "downloads", lambda: [(a, a.split("/")[-1], bool) for a in addresses])
    refuses("cifar10", tmp_path/"new", *addresses, str(tmp_path/"new"), "BNONLY_DATA", kind=FileNotFoundError)
    assert not list((tmp_path/"new").iterdir())


def test_the_addresses_are_the_libraries_own(monkeypatch):
    monkeypatch.undo()
    (binary, name, _), (original, _, whole), (fastai, _, _) = data.downloads()
    assert fastai.endswith("/cifar10.tgz") and original == datasets.CIFAR10.url and not whole(Path(__file__))
    assert name == "cifar-10-binary.tar.gz" and binary == original.replace("python", "binary")


# -------- CIFAR-10.1, MNIST, ImageNet

@pytest.fixture
def newer(tree):
    np.save(tree/"cifar10.1_v6_data.npy", np.stack([image(i) for i in range(12)]))
    np.save(tree/"cifar10.1_v6_labels.npy", np.arange(12, dtype=np.int32) % 10)
    return tree


def test_cifar10_1(newer):
    d, old = load_data("cifar10.1", newer), load_data("cifar10", newer)
    assert d.label == "CIFAR-10.1" and d.train.x.equal(old.train.x) and (d.mean, d.std) == (old.mean, old.std)
    assert len(d.test) == 12 and d.test.y.dtype == torch.int64 and d.digest != old.digest


def test_cifar10_1_names_what_it_was_trained_on(newer):
    for f in (newer/"cifar10").rglob("*.png"): f.unlink()
    for part in ("train", "test"):
        for c in CIFAR10: (newer/"cifar10"/part/c/"0.jpeg").write_bytes(encoded(image(0), "jpg"))
    assert load_data("cifar10.1", newer).label == "CIFAR-10.1, trained on CIFAR-10 (JPEG)"


def test_broken_arrays(newer):
    labels, images = newer/"cifar10.1_v6_labels.npy", newer/"cifar10.1_v6_data.npy"
    np.save(labels, np.full(12, 10))
    refuses("cifar10.1", newer, "labels.npy has the label 10", "0 to 9")
    np.save(labels, np.zeros(11, int))
    refuses("cifar10.1", newer, "11 labels for 12 images")
    np.save(labels, np.array([Trap(newer/"opened")], dtype=object), allow_pickle=True)
    refuses("cifar10.1", newer, "labels.npy")
    assert not (newer/"opened").exists()
    images.write_bytes(images.read_bytes()[:-5])
    refuses("cifar10.1", newer, "data.npy is cut off")
    np.save(images, np.zeros((12, 3, 32, 32), np.float32))
    np.save(labels, np.zeros(12, int))
    refuses("cifar10.1", newer, "data.npy holds float32")
    images.unlink()
    refuses("cifar10.1", newer, "data.npy is missing", kind=FileNotFoundError)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture(params=("", ".gz"))
def raw(request, tmp_path):
    "MNIST/raw with a few images, plain and compressed."
    folder = tmp_path/"MNIST"/"raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 30), ("t10k", 20)):
        for name, array in (
            ("images-idx3", np.arange(n * 784).reshape(n, 28, 28) % 256),
            ("labels-idx1", np.arange(n) % 10),
        ):
            content = idx(array)
            (folder / f"{part}-{name}-ubyte{request.param}").write_bytes(
                gzip.compress(content) if request.param else content
            )
    return folder


def one(raw, name): return next(raw.glob(f"{name}*"))


def test_mnist(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = load_data("mnist", raw.parent.parent)
    assert d.train.x.shape == (30, 28, 28, 1) and d.train.y.tolist() == [*range(10)]*3
    assert d.test.x.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert (d.label, d.pad, d.flip, d.in_channels) == ("MNIST", 0, False, 1)


def test_a_part_of_mnist_is_warned_of(raw):
    with pytest.warns(UserWarning, match="holds 30 items where MNIST has 60,000"): load_data("mnist", raw.parent.parent)


def test_truncated_mnist(raw):
    file = one(raw, "train-images")
    file.write_bytes(file.read_bytes()[:-10])
    refuses("mnist", raw.parent.parent, file.name, "cut off")


def test_mnist_label_out_of_range(raw):
    file, content = one(raw, "t10k-labels"), idx(np.full(20, 11))
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    refuses("mnist", raw.parent.parent, "t10k-labels-idx1-ubyte has the label 11")


def test_mnist_of_full_size_must_be_mnist(raw):
    file, content = one(raw, "t10k-labels"), idx(np.zeros(10_000))
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    refuses("mnist", raw.parent.parent, file.name, "published checksum")


def test_missing_mnist(raw):
    one(raw, "t10k-labels").unlink()
    refuses("mnist", raw.parent.parent, "t10k-labels-idx1-ubyte.gz is missing", kind=FileNotFoundError)


@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        file = tmp_path/"imagenet"/("train" if i < 6 else "val")/f"n{i%3}"/f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(i, (230 + 10*i, 300))).save(file)
    return tmp_path


def test_imagenet(photos):
    d = load_data("imagenet", photos)
    assert (
        d.classes == ("n0", "n1", "n2")
        and (len(d.train), len(d.test)) == (6, 3)
        and d.train.y.tolist() == [0, 0, 1, 1, 2, 2]
    )
    train, test = loaders(d, 4, seed=3)
    assert len(train) == 2 and train.epoch == 0
    (x, y), _ = first = list(train)
    assert x.shape == (4, 3, 224, 224) and x.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.int64
    again = FileBatches(d.train, d, 4, train=True, seed=3, workers=0)
    for (a, i), (b, j) in zip(first, again): assert a.equal(b) and i.equal(j)
    assert not x.equal(next(iter(again))[0]) and again.epoch == 2
    assert torch.cat([y for _, y in test]).tolist() == [0, 1, 2]


def test_photos_to_predict_are_paths_pictures_arrays_or_tensors(photos):
    d = load_data("imagenet", photos)
    valid = FileBatches(d.test, d, 4, workers=0)
    paths, seen = d.test.paths, next(iter(valid))[0]
    pictures = [Image.open(p) for p in paths]
    arrays = [np.array(p) for p in pictures]
    for items in (paths, pictures, arrays, [torch.from_numpy(a) for a in arrays]):
        assert torch.equal(next(iter(valid.new(items)))[0], seen)
    assert next(iter(valid.new([arrays[0][..., 0]])))[0].shape == (1, *seen.shape[1:])   # gray
    for bad in (torch.rand(3, 30, 40), arrays[0].astype(float), arrays[0][None]):
        with pytest.raises(ValueError, match="an image to predict is a path, an image of PIL's, or uint8"):
            valid.new([bad])


def test_imagenet_digest_is_that_of_names(photos, tmp_path_factory):
    before = load_data("imagenet", photos).digest
    (photos/"imagenet").rename(photos/"elsewhere")
    other = tmp_path_factory.mktemp("other")
    (photos/"elsewhere").rename(other/"imagenet")
    assert load_data("imagenet", other).digest == before
    next((other/"imagenet"/"train"/"n0").iterdir()).unlink()
    assert load_data("imagenet", other).digest != before


@pytest.mark.parametrize("workers", (0, 1))
def test_broken_photo(photos, workers):
    "It is left out, counted and named once; only a batch without any good image ends the run."
    broken = [photos/"imagenet"/"train"/f"n{i%3}"/f"{i}.JPEG" for i in (1, 2, 5)]
    for f in broken[:2]: f.write_bytes(f.read_bytes()[:1000])
    d = load_data("imagenet", photos)
    batches = FileBatches(d.train, d, 3, train=True, workers=workers)
    with pytest.warns(UserWarning, match=f"2 of 6 images cannot be decoded and are left out: {broken[0]}, {broken[1]}"):
        first = list(batches)
    assert sorted(torch.cat([y for _, y in first]).tolist()) == [0, 0, 1, 2] and all(len(x) == len(y) for x, y in first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(len(y) for _, y in batches) == 4 and batches.broken == set(map(str, broken[:2]))
    for f in d.train.paths: Path(f).write_bytes(b"")
    with pytest.raises(BrokenData) as e: list(FileBatches(d.train, d, 3, workers=workers))
    assert str(d.train.paths[0]) in str(e.value) and "\n" not in str(e.value)


def test_missing_photos(photos):
    for f in (photos/"imagenet"/"val"/"n1").iterdir(): f.unlink()
    refuses("imagenet", photos, str(photos/"imagenet"/"val"/"n1"))
    (photos/"imagenet"/"val"/"n1").rmdir()
    refuses("imagenet", photos, str(photos/"imagenet"/"val"/"n1"))
    (photos/"imagenet"/"train").rename(photos/"imagenet"/"training")
    refuses("imagenet", photos, str(photos/"imagenet"/"train"), kind=FileNotFoundError)


# -------- all of them, and the real files

def test_names():
    assert tuple(data.LOADERS) == DATASETS
    with pytest.raises(ValueError, match="the nearest is 'mnist'"): load_data("minst")


REAL = Path(os.environ["BNONLY_DATA"]).expanduser() if os.environ.get("BNONLY_DATA") else None


def real(*names):
    missing = [n for n in names if REAL is None or not (REAL/n).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"BNONLY_DATA names no folder with {', '.join(missing)}")


@real("cifar10.tgz")
def test_real_cifar10(tmp_path):
    (tmp_path/"cifar10.tgz").symlink_to(REAL/"cifar10.tgz")
    d = load_data("cifar10", tmp_path)
    assert (
        d.train.x.shape == (50_000, 32, 32, 3)
        and d.train.y.bincount().tolist() == [5000] * 10
        and d.test.y.bincount().tolist() == [1000] * 10
    )
    assert np.allclose(d.mean, (.4914, .4822, .4465), atol=.002) and np.allclose(d.std, (.247, .2435, .2616), atol=.004)


@real("MNIST")
def test_real_mnist():
    d = load_data("mnist", REAL)
    assert (len(d.train), len(d.test)) == (60_000, 10_000) and (d.mean, d.std) == ((.1307,), (.3081,))
