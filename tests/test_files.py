"Images, folders and tables as they are found on disks: odd, hostile, or in another place."
import os
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from bnonly import data
from bnonly.archives import BrokenData, left_behind, walk
from bnonly.data import Data, FileBatches, Images, describe, load_data
from bnonly.downloads import download
from bnonly.photos import MOST_PIXELS, as_bytes, middle, open_image
from PIL import Image


def saved(image, kind):
    image.save(file := BytesIO(), kind)
    file.seek(0)
    return file


def bomb(side):
    "A PNG of side x side black pixels in a few kilobytes."
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"*1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", (10_000, 20_000, 2**31 - 1))
def test_a_huge_image_is_refused_by_its_name(side):
    assert side**2 > MOST_PIXELS
    with pytest.raises(BrokenData, match="scan.png cannot be decoded"): open_image(BytesIO(bomb(side)), "scan.png")


def test_sixteen_bits_and_floats_keep_their_picture():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(4, 0)
    assert (np.asarray(open_image(saved(Image.fromarray(ramp), "PNG"), "x"))[0, :, 0] == ramp[0] >> 8).all()
    for top in (1, 255):
        floats = (ramp/65535*top).astype(np.float32)
        found = np.asarray(open_image(saved(Image.fromarray(floats), "TIFF"), "x"))[0, :, 0]
        assert abs(found - ramp[0]/257).max() <= .51
    for top, kept in ((255, ramp >> 8), (65_535, ramp)):   # of 32 bits
        found = open_image(saved(Image.fromarray(kept.astype(np.int32)), "TIFF"), "x")
        assert (np.asarray(found)[0, :, 0] == ramp[0] >> 8).all(), top
    for odd in ([-1.], [256.], [float("nan")], np.array([-1], np.int32), np.array([70_000], np.int32)):
        with pytest.raises(ValueError): as_bytes(np.asarray(odd))


@pytest.mark.parametrize("size", ((1, 60_000), (60_000, 1), (5, 21)))
def test_a_slim_image_stays_small(size):
    assert max(middle(Image.new("RGB", size)).size) == 4*min(size)
    usual = Image.new("RGB", (300, 1200))
    assert middle(usual) is usual


def folder_of(root, classes="ab", n=2):
    for part in ("train", "val"):
        for c in classes:
            (root/part/c).mkdir(parents=True)
            for i in range(n): Image.new("RGB", (8, 8), (i, 0, 0)).save(root/part/c/f"{i}.JPEG")
    return root


def test_what_tools_leave_is_no_class_and_no_image(tmp_path):
    root = folder_of(tmp_path/"imagenet")
    before = load_data("imagenet", tmp_path).digest
    for at in (root/"train", root/"train"/"a", root/"val"/"b"):
        for name in ("@eaDir", ".ipynb_checkpoints", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found", "CVS"):
            (at/name).mkdir()
            Image.new("RGB", (8, 8)).save(at/name/"thumb.jpg")
    Image.new("RGB", (8, 8)).save(root/"train"/"a"/"._0.JPEG", "JPEG")
    d = load_data("imagenet", tmp_path)
    assert (d.classes, d.digest) == (("a", "b"), before)
    assert left_behind("@eaDir") and not left_behind("n01443537")


def test_names_that_are_not_utf8(tmp_path):
    root = folder_of(tmp_path/"imagenet")
    for part in ("train", "val"):
        os.rename(root/part/"a"/"0.JPEG", os.fsencode(root/part/"a") + b"/\xe9.JPEG")
        os.rename(root/part/"b", os.fsencode(root/part) + b"/\xe8")
    d = load_data("imagenet", tmp_path)
    assert len(d.train) == 4 and d.digest != load_data("imagenet", folder_of(tmp_path/"other"/"imagenet").parent).digest
    assert sum(len(y) for _, y in FileBatches(d.train, d, 4, workers=0)) == 4


def test_links_that_lead_in_a_circle_count_nothing_twice(tmp_path):
    root = folder_of(tmp_path/"imagenet")
    (tmp_path/"more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path/"more"/"9.JPEG")
    for link, target in (("train/a/up", root/"train"), ("train/a/self", root/"train"/"a"), ("val/b/all", tmp_path),
                         ("train/loop", root/"train")):
        (root/link).symlink_to(target)
    (root/"train"/"a"/"more").symlink_to(tmp_path/"more")
    (tmp_path/"more"/"back").symlink_to(tmp_path/"more")
    d = load_data("imagenet", tmp_path)
    assert (len(d.train), len(d.test), d.classes) == (5, 4, ("a", "b"))
    (root/"train"/"a"/"gone.JPEG").symlink_to(tmp_path/"nowhere")
    assert str(root/"train"/"a"/"gone.JPEG") in walk(root/"train")   # counted when it cannot be decoded


@pytest.mark.parametrize("own", (False, True))
def test_the_folder_may_be_the_data_sets_own(tmp_path, own):
    folder_of(tmp_path/"imagenet")
    assert len(load_data("imagenet", tmp_path/"imagenet" if own else tmp_path).train) == 4


def test_a_huge_photo_is_left_out_and_counted(tmp_path):
    root = folder_of(tmp_path/"imagenet")
    (root/"train"/"a"/"scan.png").write_bytes(bomb(20_000))
    d = load_data("imagenet", tmp_path)
    with pytest.warns(UserWarning, match="1 of 5 images cannot be decoded .*scan.png"):
        assert sum(len(y) for _, y in FileBatches(d.train, d, 5, workers=0)) == 4


def test_images_of_another_kind_are_refused():
    x, y = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4)
    for bad, label, word in ((x.permute(0, 3, 1, 2), y, "channels last"), (x/255, y, "float32"),
                             (x.numpy(), y, "uint8"), (x[0], y, "shape"),
                             (x, y.float(), "int64"), (x, y[:3], "3"), (x[:0], y[:0], "at least one")):
        with pytest.raises(ValueError, match=word): Images(bad, label)
    images, cut = Images(x, y), Images(x[:, 1:], y)
    with pytest.raises(ValueError, match="label 3, outside 0 to 2"): describe("mine", "Mine", images, images, "abc")
    with pytest.raises(ValueError, match="test images"): describe("mine", "Mine", images, cut, "abcd")
    d = describe("mine", "Mine", Images(x, y), Images(x, y), "abcd")
    assert isinstance(d, Data) and len(repr(d)) < 200 and d.digest in repr(d)


def test_a_download_that_ends_early_is_named(tmp_path, monkeypatch):
    class Cut(BytesIO): headers = {"Content-Length": "1000"}
    monkeypatch.setattr("bnonly.downloads.urlopen", lambda *a, **k: Cut(b"x"*10))
    with pytest.raises(FileNotFoundError, match="ended after 10 of 1,000 bytes"):
        download(tmp_path/"new", [("http://here/cifar10.tgz", "cifar10.tgz", lambda f: True)])
    assert not list((tmp_path/"new").iterdir())


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "Two classes in Tiny ImageNet's layout, the first image gray."
    monkeypatch.setattr(data, "TINY_SIZE", (6, 4))
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    for name in ("BNONLY_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    home = tmp_path/"tiny-imagenet-200"
    (home/"val"/"images").mkdir(parents=True)
    for y, wnid in enumerate(("n02", "n01")):
        (home/"train"/wnid/"images").mkdir(parents=True)
        for i in range(3):
            image = Image.new("RGB" if i else "L", (64, 64), (50*y, i, 9) if i else 50*y)
            image.save(home/"train"/wnid/"images"/f"{wnid}_{i}.JPEG")
    for i in range(4): Image.new("RGB", (64, 64), (i, i, i)).save(home/"val"/"images"/f"val_{i}.JPEG")
    (home/"val"/"val_annotations.txt").write_text("".join(f"val_{i}.JPEG\tn0{1 + i%2}\t0\t0\t9\t9\n" for i in range(4)))
    (home/"wnids.txt").write_text("n02\nn01\n")
    (home/"words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\n")
    return home


def test_tiny_imagenet(tiny):
    with warnings.catch_warnings(action="error"):
        one, two, own = (load_data("tiny-imagenet", o) for o in (tiny.parent, tiny.parent, tiny))
    assert (one.label, one.classes) == ("Tiny ImageNet", ("goldfish", "bullfrog"))
    assert (one.size, one.pad, one.flip) == (64, 8, True)
    assert one.train.y.tolist() == [0, 0, 0, 1, 1, 1] and one.test.y.tolist() == [0, 1, 0, 1]
    assert one.train.x.shape == (6, 64, 64, 3) and one.train.x[0].unique().tolist() == [50]
    assert one.digest == two.digest == own.digest
    a, b = (tiny/"train"/n/"images"/f"{n}_0.JPEG" for n in ("n01", "n02"))
    a.rename(tiny/"kept"), b.rename(a), (tiny/"kept").rename(b)
    with pytest.warns(UserWarning, match="changed since"): assert load_data("tiny-imagenet", tiny).digest != one.digest


def test_broken_tiny_imagenet(tiny):
    def refuses(word, kind=BrokenData):
        with pytest.raises(kind, match=word): load_data("tiny-imagenet", tiny.parent)
    Image.new("RGB", (63, 64)).save(tiny/"val"/"images"/"val_3.JPEG")
    refuses("val_3.JPEG has 63x64 pixels")
    os.remove(tiny/"val"/"images"/"val_3.JPEG")
    refuses("val_3.JPEG is missing")
    with pytest.raises(BrokenData, match="is Tiny ImageNet, not ImageNet"): load_data("imagenet", tiny)
    os.remove(tiny/"wnids.txt")
    refuses("wnids.txt is missing", FileNotFoundError)
