"""Damage to published checkpoints, drawn at random: lying headers, broken bytes, settings that are something else."""

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Header = list[tuple[str, Any]]
ODD_NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**31, 2**63, 2**64, 10**30, 10**4000, 0.5, 1.0, -2.5, 1e300]
ODD_VALUES = [None, True, False, "", "text", "1", [], [1], [[]], {}, {"a": 1}, float("nan"), float("inf"), "\ud800\n"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "f32", "C64", "", None, 32]
NAMES = ["", "a", "\n", "x" * 3000, "モデル", "\ud800", "__metadata__", "model", "lm_head.weight", "../weight", "\0"]


def packed(header: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


def unpacked(file: bytes) -> tuple[Header, bytes]:
    """The entries, in order, and the bytes behind them."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    return list(json.loads(file[8:end]).items()), file[end:]


def written(header: Header) -> bytes:
    """The entries as JSON, also where a name comes twice."""
    return ("{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in header) + "}").encode()


def mutated_file(file: bytes, random: Random) -> tuple[str, bytes]:
    """What was done, and the file after it."""
    header, data = unpacked(file)
    kind = random.choice([*ENTRIES, *ENTRIES, *FILES])
    if kind in FILES:
        return kind, FILES[kind](file, random)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        data = ENTRIES[kind](header, data, random) or data
    return kind, packed(written(header), data)


def _one(header: Header, random: Random) -> dict[str, Any]:
    entries = [entry for name, entry in header if name != "__metadata__" and isinstance(entry, dict)]
    return random.choice(entries) if entries else {}


def _offsets(header: Header, data: bytes, random: Random) -> None:
    entry = _one(header, random)
    place, other = entry.get("data_offsets"), _one(header, random).get("data_offsets")
    if isinstance(place, list) and len(place) == 2 and all(isinstance(one, int) for one in place):
        by = random.choice([1, -1, 4, -4, len(data), -len(data), 10**12])
        entry["data_offsets"] = random.choice(
            [
                [place[0] + by, place[1] + by], [place[0], place[1] + by], [place[0] + by, place[1]], place[::-1],
                [place[0]], [*place, place[1]], [], other, [one + 0.0 for one in place if one < 2**63],
                [str(one) for one in place if one < 2**63],
                [place[0], random.choice(ODD_NUMBERS)], [random.choice(ODD_NUMBERS), place[1]], [place],
                random.choice(ODD_VALUES),
            ]
        )  # fmt: skip


def _shape(header: Header, data: bytes, random: Random) -> None:
    entry = _one(header, random)
    shape = entry.get("shape")
    if isinstance(shape, list):
        odd = random.choice(ODD_NUMBERS)
        entry["shape"] = random.choice(
            [
                shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [], [0], [odd], [odd, *shape[1:]], [*shape, 0],
                [10**12, 10**12], [2**63, 2**63, 0], [10**18] * 20_000, [[one] for one in shape],
                [f"{one!r:.9}" for one in shape],
                [float(one) for one in shape if isinstance(one, int) and one < 10**6], [True, *shape[1:]],
                random.choice(ODD_VALUES), [-1, -1, *shape],
            ]
        )  # fmt: skip


def _dtype(header: Header, data: bytes, random: Random) -> None:
    _one(header, random)["dtype"] = random.choice([*DTYPES, *ODD_VALUES])


def _both(header: Header, data: bytes, random: Random) -> None:
    """Another type of the same size, or of half of it with a shape to fit."""
    entry = _one(header, random)
    same = {"F32": ["I32", "U32"], "F16": ["BF16", "I16"], "BF16": ["F16"], "I64": ["F64"], "F64": ["I64"]}
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if random.random() < 0.5 and dtype in ("F32", "I32") and isinstance(shape, list) and shape:
        entry["dtype"], entry["shape"] = random.choice(["F16", "BF16"]), [*shape[:-1], 2 * shape[-1]]
    elif isinstance(dtype, str):
        entry["dtype"] = random.choice(same.get(dtype, ["F32"]))


def _rename(header: Header, data: bytes, random: Random) -> None:
    place = random.randrange(len(header))
    name, entry = header[place]
    new = [*NAMES, name.upper(), f"{name} ", name.replace("model.", "", 1), f"model.{name}", name.replace("1", "2")]
    new += [name.replace("weight", "bias"), header[random.randrange(len(header))][0]]
    header[place] = random.choice(new), entry


def _rename_all(header: Header, data: bytes, random: Random) -> None:
    prefix = random.choice(["model.", "bert.", "m", ""])
    more = random.choice(["", "model.", "\n"])
    header[:] = [(more + name.removeprefix(prefix), entry) for name, entry in header]


def _swap(header: Header, data: bytes, random: Random) -> None:
    """Two tensors change names, or places, or only their order in the header."""
    one, other = random.randrange(len(header)), random.randrange(len(header))
    names, entries = [name for name, _ in header], [entry for _, entry in header]
    how = random.choice(["names", "entries", "order"])
    if how == "order":
        header[one], header[other] = header[other], header[one]
        return
    if how == "names":
        names[one], names[other] = names[other], names[one]
    elif isinstance(entries[one], dict) and isinstance(entries[other], dict):
        first, second = entries[one].get("data_offsets"), entries[other].get("data_offsets")
        entries[one], entries[other] = (
            {**entries[one], "data_offsets": second},
            {**entries[other], "data_offsets": first},
        )
    header[:] = zip(names, entries, strict=True)


def _again(header: Header, data: bytes, random: Random) -> bytes | None:
    """A name comes twice: with the same place, another's, or bytes of its own."""
    name, entry = random.choice(header)
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return None
    place = random.choice([0, len(header), random.randrange(len(header))])
    header.insert(place, (name, dict(random.choice([entry, _one(header, random)]))))
    return None


def _extra(header: Header, data: bytes, random: Random) -> bytes:
    """One more tensor, with bytes of its own."""
    shape, (dtype, size) = random.choice([[3], [0], [], [2, 2]]), random.choice([("F32", 4), ("I64", 8), ("U8", 1)])
    count = 1
    for one in shape:
        count *= one
    name = random.choice([*NAMES, "bert.embeddings.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size * count]}
    header.insert(random.randrange(len(header) + 1), (name, entry))
    return data + random.randbytes(size * count)


def _drop(header: Header, data: bytes, random: Random) -> None:
    del header[random.randrange(len(header))]
    if not header:
        header.append(("a", {}))


def _drop_last(header: Header, data: bytes, random: Random) -> bytes:
    """The last tensor goes with its bytes: a file that is whole in itself."""
    known = [(entry["data_offsets"], name) for name, entry in header if isinstance(entry, dict) and "shape" in entry]
    (first, _), name = max(known, default=(([len(data), 0]), ""), key=lambda one: str(one[0]).zfill(30))
    header[:] = [one for one in header if one[0] != name] or [("a", {})]
    return data[:first] if isinstance(first, int) else data


def _entry(header: Header, data: bytes, random: Random) -> None:
    place = random.randrange(len(header))
    name, entry = header[place]
    keys = list(entry) if isinstance(entry, dict) else []
    new: Any = random.choice([*ODD_VALUES, *ODD_NUMBERS])
    if keys and random.random() < 0.7:
        key = random.choice(keys)
        new = {one: value for one, value in entry.items() if one != key}
        if random.random() < 0.7:
            new[random.choice([key, key.upper(), "other"])] = random.choice([*ODD_VALUES, *ODD_NUMBERS])
    header[place] = name, new


def _metadata(header: Header, data: bytes, random: Random) -> None:
    header[:] = [one for one in header if one[0] != "__metadata__"]
    value = random.choice([{"format": "tf"}, {"format": 3}, {"a": {"b": {}}}, {}, *ODD_VALUES])
    header.insert(random.randrange(len(header) + 1), ("__metadata__", value))


ENTRIES: dict[str, Callable[[Header, bytes, Random], bytes | None]] = {
    "offsets": _offsets, "shape": _shape, "dtype": _dtype, "type and shape": _both, "rename": _rename,
    "rename all": _rename_all, "swap": _swap, "twice": _again, "extra": _extra, "drop": _drop,
    "drop the last": _drop_last, "entry": _entry, "metadata": _metadata,
}  # fmt: skip


def _length(file: bytes, random: Random) -> bytes:
    length = struct.unpack("<Q", file[:8])[0]
    new = random.choice([0, 1, length - 1, length + 1, length + 8, len(file), 2**31, 2**63, 2**64 - 1, len(file) - 8])
    return struct.pack("<Q", new) + file[8:]


def _padded(file: bytes, random: Random) -> bytes:
    """Blanks after the header, so that tensors lie at places that are no multiple of their items' size."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    blank = random.choice([b" ", b"\n", b"\t", b"\0", b"}", b","]) * random.choice([1, 1, 2, 3, 4, 5, 7, 1000])
    front = random.random() < 0.3
    return packed(blank + file[8:end] if front else file[8:end] + blank, file[end:])


def _truncated(file: bytes, random: Random) -> bytes:
    end = 8 + struct.unpack("<Q", file[:8])[0]
    header, _data = unpacked(file)
    borders = [0, 7, 8, 9, end - 1, end, end + 1, len(file) - 1]
    borders += [end + entry["data_offsets"][1] for name, entry in header if name != "__metadata__"]
    cut = random.choice([*borders, random.randrange(len(file))])
    return file[:cut] + random.choice([b"", b"", b"\0", bytes(max(0, len(file) - cut))])


def _flipped(file: bytes, random: Random, first: int, last: int) -> bytes:
    changed = bytearray(file)
    for _ in range(random.choice([1, 1, 2, 5])):
        changed[random.randrange(first, last)] = random.choice([random.randrange(256), *b'0123456789{}[]",:.-eFBI'])
    return bytes(changed)


def _encoded(file: bytes, random: Random) -> bytes:
    """The header in another encoding, or none."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    text = file[8:end].decode()
    header = random.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.encode("utf-8-sig"),
            text.encode()[:-1] + b"\xff}",
            text.replace("weight", "w\udcffeight").encode(errors="surrogateescape"),
            b"\xff" * 64,
        ]
    )
    return packed(header, file[end:])


def _nested(file: bytes, random: Random) -> bytes:
    end, depth = 8 + struct.unpack("<Q", file[:8])[0], random.choice([100, 900, 5000, 100_000])
    start, stop = random.choice([("[", "]"), ('{"a": ', "}")])
    inner = start * depth + random.choice(["1", ""]) + stop * depth
    whole = random.choice([inner, '{"__metadata__": ' + inner + "}", '{"a": {"shape": ' + inner + "}}"])
    return packed(whole.encode(), file[end:])


FILES: dict[str, Callable[[bytes, Random], bytes]] = {
    "length": _length,
    "padded": _padded,
    "truncated": _truncated,
    "flipped header": lambda file, random: _flipped(file, random, 0, 8 + struct.unpack("<Q", file[:8])[0]),
    "flipped data": lambda file, random: _flipped(file, random, 8 + struct.unpack("<Q", file[:8])[0], len(file)),
    "encoded": _encoded,
    "nested": _nested,
    "longer": lambda file, random: file + random.randbytes(random.choice([1, 8, 5000])),
    "noise": lambda file, random: random.randbytes(random.choice([0, 1, 8, 9, 100, 5000])),
}


def mutated_shards(files: dict[str, bytes], index: str, random: Random) -> tuple[str, dict[str, bytes]]:
    """A sharded checkpoint with another index, or with other shards."""
    table = json.loads(files[index])
    names, shards = list(table["weight_map"]), sorted(set(table["weight_map"].values()))
    name, shard, other = random.choice(names), random.choice(shards), random.choice(shards)
    kind = random.choice(["place", "place", "name", "table", "bytes", "shard", "same", "lost", "moved"])
    files = dict(files)
    if kind == "shard":
        files[shard] = mutated_file(files[shard], random)[1]
    elif kind == "same":
        files[shard] = files[other]
    elif kind == "lost":
        del files[random.choice([shard, index])]
    elif kind == "moved":
        new = random.choice(["a.safetensors", "モデル.safetensors", "model.bin", " .safetensors"])
        files[new] = files.pop(shard)
        table["weight_map"] = {one: new if at == shard else at for one, at in table["weight_map"].items()}
    elif kind == "bytes":
        files[index] = random.choice(
            [
                files[index][: random.randrange(len(files[index]))], _flipped(files[index], random, 0,
                len(files[index])),
                b"[" * 100_000, b'{"weight_map":' * 5000, b"\xff\xfe", b"", files[shard], b"3", b"null", b"9" * 5000,
                files[index].decode().encode("utf-16"), b'{"weight_map": {}}', b'{"weight_map": {}}',
                b'{"weight_map": {}, ' + files[index][1:],
            ]
        )  # fmt: skip
    elif kind == "place":
        places = [
            other,
            f"../{shard}",
            f"./{shard}",
            f"/{shard}",
            "",
            ".",
            "..",
            "/",
            f"{shard}/",
            "config.json",
            "a/b",
        ]
        places += ["x" * 5000 + ".safetensors", "\n.safetensors", "\0.safetensors", "\ud800.safetensors", *ODD_VALUES]
        everywhere = random.random() < 0.3
        new = random.choice(places)
        table["weight_map"] = {
            one: new if one == name or (everywhere and at == shard) else at for one, at in table["weight_map"].items()
        }
    elif kind == "name":
        if random.random() < 0.5:
            del table["weight_map"][name]
        if random.random() < 0.7:
            table["weight_map"][random.choice([*NAMES, f"model.{name}"])] = shard
    elif kind == "table":
        key = random.choice(["weight_map", "metadata"])
        table[key] = random.choice([*ODD_VALUES, [*table["weight_map"].items()], *ODD_NUMBERS[:5]])
        table = random.choice([table, table, [table], table[key]])
    if kind in ("place", "name", "table", "moved"):
        files[index] = json.dumps(table).encode()
    return kind, files
