"Files that lie: what may have become of a sealed file of tensors, by accident or on purpose."
import json

import torch
from bnonly.sealed import serialize

PREFIX = 8
LIES = [
    "",
    "0",
    "-1",
    "9" * 25,
    "9" * 5000,
    "1e9",
    "NaN",
    "None",
    "../../etc/passwd",
    "__import__('os')",
    "\x00",
    "{}",
    "１",
    "resnet8.5",
    "resnet1994",
    "resnet866",
    "resnet200",
    "resnet8888888",
    "wrn14-32",
    "wrn1994-9999",
    "wrn14-99999999999",
    "vgg19",
    "random999999999",
    "scattered1",
    "all+bn",
    "norm",
    "plain",
    "float64",
    "<script>alert(1)</script>",
    '["fc"]',
    "[[[[1]]]]",
    "null",
    "batch",
    "frozen",
]


def parts(content):
    n = int.from_bytes(content[:PREFIX], "little")
    return json.loads(content[PREFIX:PREFIX + n]), content[PREFIX + n:]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(PREFIX, "little") + text + data


def unsealed(metadata):
    return {k: v for k, v in metadata.items() if k != "digest"}


def truncated(rng, good, metadata, vectors):
    return good[:rng.randrange(len(good))]


def flipped(rng, good, metadata, vectors):
    odd = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        odd[rng.randrange(len(odd))] ^= 1 << rng.randrange(8)
    return bytes(odd)


def grown(rng, good, metadata, vectors):
    return good + rng.randbytes(rng.randrange(1, 99)) if rng.random() < .5 else rng.randbytes(rng.randrange(2000))


def claimed(rng, good, metadata, vectors):
    return (
        rng.choice([2**16 + 1, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**64)]).to_bytes(PREFIX, "little")
        + good[PREFIX:]
    )


def header_lied(rng, good, metadata, vectors):
    "Shapes, types, offsets, names."
    header, data = parts(good)
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    what = rng.choice(["shape", "dtype", "data_offsets", "name", "drop", "twice", "junk"])
    if what == "shape":
        entry["shape"] = rng.choice(
            [
                o
                for o in ([], [2**62], [2**32, 2**32], [0], [-1], [*entry["shape"], 1], [10**30], "all", [1.5])
                if o != entry["shape"]
            ]
        )
    if what == "dtype":
        entry["dtype"] = rng.choice(
            [o for o in ("F16", "F64", "BF16", "I64", "F32", "U8", "BOOL", "F4096", 7, None) if o != entry["dtype"]]
        )
    if what == "data_offsets":
        entry["data_offsets"] = rng.choice([[0, 2**60], [-8, 0], [0, 0], [8, 4], [2**63, 2**64], [0], "x"])
    if what in ("name", "drop"): header.pop(name)
    if what == "name": header[rng.choice(["conv.weight", "bn.gamma", "../x", "", "é" * 99])] = entry
    if what == "twice": header["bn.extra"] = dict(entry)
    if what == "junk":
        header = rng.choice([b"[" * 9999, b"{}", b"null", b'{"__metadata__": 3}', b"\xff" * 40, b'{"a":' * 5000])
    return joined(header, data)


def metadata_lied(rng, good, metadata, vectors):
    "Any field missing, unknown, of another type or size; sealed as if it were true."
    metadata, what = dict(metadata), rng.choice(["value", "value", "value", "drop", "more", "type"])
    name = rng.choice([k for k in metadata if k not in ("versions", "digest")])
    if what == "value": metadata[name] = rng.choice([v for v in LIES if v != metadata[name]])
    if what == "drop": del metadata[name]
    if what == "more": metadata[rng.choice(["code", "__class__", "x" * 999])] = rng.choice(LIES)
    if what != "type": return serialize(unsealed(metadata), vectors)
    header, data = parts(good)
    header["__metadata__"][name] = rng.choice([3, None, ["x"], {"a": 1}])
    return joined(header, data)


def vectors_lied(rng, good, metadata, vectors):
    "Other lengths, types and numbers that are none; sealed as if they were true."
    odd, name = dict(vectors), rng.choice([n for n, t in vectors.items() if t.ndim])
    what = rng.choice(["longer", "shorter", "type", "nan", "missing", "more", "matrix"])
    if what == "longer": odd[name] = torch.cat([odd[name], odd[name][:1]])
    if what == "shorter": odd[name] = odd[name][:rng.randrange(len(odd[name]))]
    if what == "type": odd[name] = odd[name].to(rng.choice([torch.float16, torch.float64, torch.int32, torch.bool]))
    if what == "nan":
        name = rng.choice([v for v in odd if odd[v].is_floating_point()])
        odd[name] = odd[name].clone()
        odd[name].view(-1)[rng.randrange(odd[name].numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    if what == "missing": del odd[name]
    if what == "more": odd["conv.weight"] = torch.zeros(3)
    if what == "matrix": odd[name] = odd[name][None]
    return serialize(unsealed(metadata), odd)


KINDS = truncated, flipped, grown, claimed, header_lied, metadata_lied, vectors_lied
