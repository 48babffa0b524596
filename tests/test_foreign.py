"""Foreign bytes: whatever a file holds, loading it ends well or in one short line, within bounds of time and memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from causalreel import config
from causalreel.families.wan21.codec_files import load_taehv, load_wan_vae
from causalreel.foreign import file_in, read_json, read_text, shown
from causalreel.headers import read_header
from causalreel.infer.models import find
from causalreel.nn.presets import ModelConfig
from causalreel.text.umt5 import Tokenizer
from causalreel.weights.export import Export, load_codec, load_export, read_export
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.layouts import read_network
from causalreel.weights.umt5_files import load_umt5
from ceilings import examples, work_within

ESCAPE = "\x1b[31mred\x07\u202e\n"


def refused(load: Callable[[], object], *parts: str) -> None:
    """ValueError or OSError in one line of at most 700 printable characters that contains all of `parts`."""
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    message = str(caught.value)
    assert len(message) <= 700 and message.isprintable(), message[:2000]
    for part in parts:
        assert part in message, message


# ------------------------------------------------------------------------------------------------ .safetensors headers


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def headed(path: Path, header: object, values: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + values)
    return path


HEADERS: dict[str, tuple[object, str]] = {
    "offsets empty": ({"a": tensor(offsets=[])}, "data_offsets"),
    "offsets texts": ({"a": tensor(offsets=["0", "8"])}, "data_offsets"),
    "offsets a text": ({"a": tensor(offsets="08")}, "data_offsets"),
    "offsets nested": ({"a": tensor(offsets=[[0], [8]])}, "data_offsets"),
    "offsets three": ({"a": tensor(offsets=[0, 4, 8])}, "data_offsets"),
    "offsets negative": ({"a": tensor(offsets=[-8, 0])}, "data_offsets"),
    "offsets turned": ({"a": tensor(offsets=[8, 0])}, "data_offsets"),
    "offsets fractions": ({"a": tensor(offsets=[0.0, 8.0])}, "data_offsets"),
    "offsets booleans": ({"a": tensor(offsets=[False, True], shape=[1], dtype="U8")}, "data_offsets"),
    "offsets huge": ({"a": tensor(offsets=[0, 10**400])}, "data_offsets"),
    "offsets beyond": ({"a": tensor(shape=[4], offsets=[0, 16])}, "shorter than its header says"),
    "offsets short": ({"a": tensor(shape=[1], offsets=[0, 4])}, "belong to none"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=[0, 8])}, "overlaps"),
    "gap": ({"a": tensor(shape=[1], offsets=[4, 8])}, "gap"),
    "shape text": ({"a": tensor(shape="2")}, "shape"),
    "shape negative": ({"a": tensor(shape=[-1, -2])}, "shape"),
    "shape null": ({"a": tensor(shape=None)}, "shape"),
    "shape long": ({"a": tensor(shape=[1] * 5000)}, "shape"),
    "shape overflowing": ({"a": tensor(shape=[2**40, 2**40])}, "do not fit"),
    "shape wrapping to zero": ({"a": tensor(shape=[2**32, 2**32], offsets=[0, 0])}, "do not fit"),
    "dtype unknown": ({"a": tensor("F33")}, "dtype"),
    "dtype list": ({"a": tensor(["F32"])}, "dtype"),
    "entry list": ({"a": [1, 2]}, "no dtype"),
    "entry null": ({"a": None}, "no dtype"),
    "metadata list": ({"__metadata__": [1], "a": tensor()}, "__metadata__"),
    "metadata numbers": ({"__metadata__": {"a": 1}, "a": tensor()}, "__metadata__"),
    "top list": ([1, 2], "JSON object"),
    "twice": (b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), "twice"),
    "deep": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "UTF-8"),
    "many": (b"{" + b'"a":{},' * 200_000 + b'"b":1}', "100,000 tensors"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", "header"),
    "long name": ({"x" * 1_000_000: tensor()}, "1,000,000 characters"),
    "name with controls": ({ESCAPE: tensor("F33")}, r"\x1b[31mred\x07\u202e\n"),
    "constants": (b'{"a": NaN}', "no JSON"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_header_is_named(tmp_path: Path, name: str) -> None:
    header, message = HEADERS[name]
    path = headed(tmp_path / "m.safetensors", header)
    refused(lambda: read_tensors(path), "m.safetensors", message)


@pytest.mark.parametrize("length", [0, 7, 2**60, 2**64 - 1, 2**31])
def test_a_header_of_absurd_length_is_not_read(tmp_path: Path, length: int) -> None:
    path = headed(tmp_path / "m.safetensors", {"a": tensor()}, length=length)
    refused(lambda: read_tensors(path), "damaged")
    with path.open("ab") as file:
        file.truncate(2**31 + 100)  # sparse: a file that is long enough
    refused(lambda: read_tensors(path), "damaged")


def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.safetensors")
    refused(lambda: read_tensors(tmp_path / "p.safetensors"), "no ordinary file")
    refused(lambda: read_tensors(tmp_path / ("a" * 300 + ".safetensors")), "too long")
    refused(lambda: read_tensors(tmp_path / "absent\x1b.safetensors"), "not found", r"\x1b")


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "a JSON object is expected"),
        (b"null", "a JSON object is expected"),
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "config.json"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "looks like UTF-16"),
        (b'{"weight_map": [1]}', "object of texts"),
        (b'{"weight_map": {"a": null}}', "object of texts"),
        (b'{"weight_map": "x"}', "object of texts"),
        (b'{"a": ' + b" " * (17 << 20) + b"1}", "too large"),
    ],
)
def test_wrong_json_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(text)
    if "object of texts" not in message:
        refused(lambda: read_json(tmp_path / "config.json"), message)
    refused(lambda: read_network(tmp_path))
    refused(lambda: load_umt5(tmp_path))


def test_json_and_configs_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1} and read_text(tmp_path / "a.json").startswith("{")
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert config.read(tmp_path / "a.yaml") == {"a": 1}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b", "x" * 300])
def test_an_index_names_plain_files_beside_it(tmp_path: Path, name: str) -> None:
    refused(lambda: file_in(tmp_path, name, "index"), "plain name")


def test_links_may_lead_where_the_hubs_cache_needs_them(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    for made in ("snapshots/1/text", "blobs"):
        (repo / made).mkdir(parents=True)
    (repo / "blobs" / "77").write_text("")
    (tmp_path / "secret").write_text("")
    for folder, up in ((repo / "snapshots/1", "../../blobs/77"), (repo / "snapshots/1/text", "../../../blobs/77")):
        (folder / "in").symlink_to(up)
        (folder / "out").symlink_to(tmp_path / "secret")
        assert file_in(folder, "in", "index").is_file()
        refused(lambda folder=folder: file_in(folder, "out", "index"), "leads out")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a").write_text("")
    (plain / "b").symlink_to("a")
    assert file_in(plain, "b", "index").is_file()


# ---------------------------------------------------------------------------------------------------------------- YAML


def bomb(depth: int, first: str, repeat: str) -> str:
    return first + "".join(repeat.format(new=f"a{i + 1}", old=f"a{i}") for i in range(depth))


YAMLS = {
    "aliases": bomb(30, "a0: &a0 [x]\n", "{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"),
    "merges": bomb(20, "a0: &a0 {k: 1}\n", "{new}: &{new} {{<<: [*{old}, *{old}, *{old}]}}\n"),
    "itself": "a: &a [*a]\n",
    "unknown alias": "a: *b\n",
    "flow depth": "a: " + "[" * 100_000,
    "block depth": "- " * 100_000,
    "map depth": "{a: " * 5_000,
    "values": "a: [" + "1, " * 100_000 + "1]",
    "object": "a: !!python/object/apply:os.system ['true']\n",
    "name": "a: !!python/name:os.system\n",
    "own tag": "a: !mine 1\n",
    "bad int": "a: !!int x\n",
    "empty int": "a: !!int ''\n",
    "long int": "a: " + "9" * 10_000 + "\n",
    "bad bool": "a: !!bool x\n",
    "bad time": "a: 2020-99-99\n",
    "bad time tag": "a: !!timestamp x\n",
    "twice": "a: 1\na: 2\n",
    "list as key": "? [1, 2]\n: 1\n",
    "control": "a: \x01\n",
    "two documents": "a: 1\n---\na: 2\n",
    "not a mapping": "[" + "'root:x:0:0', " * 1000 + "1]",
    "tab": "a:\n\t- 1\n",
    "controls in a key": '"' + ESCAPE.encode("unicode_escape").decode().replace("\\x", "\\x") + '": 1\n',
    "long key": "x" * 900 + ": 1\n",
    "extends": "extends: ../secret.yaml\n",
    "extends a list": "extends: [a.yaml, b.yaml]\n",
    "extends a number": "extends: 3\n",
    "extends itself": "extends: config.yaml\n",
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_config_is_plain_values_within_bounds(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAMLS[name])
    began = time.process_time()
    refused(lambda: read_export(tmp_path), "config.yaml")
    assert time.process_time() - began < 10
    if "extends" in name:
        refused(lambda: read_export(tmp_path), "extends")


def test_a_recipe_extends_yaml_files_and_a_bounded_number_of_them(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root:x:0:0\n")
    for number in range(12):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "12.yaml").write_text("a: 1\n")
    (tmp_path / "p.yaml").write_text("extends: passwd\n")
    refused(lambda: config.read(tmp_path / "0.yaml"), "more than 64 files")
    assert config.read(tmp_path / "8.yaml") == {"a": 1}
    refused(lambda: config.read(tmp_path / "p.yaml"), "a .yaml file")
    (tmp_path / "p.yaml").write_text("base: &b {c: 1}\nmore: {a: *b}\n")
    assert config.read(tmp_path / "p.yaml")["more"] == {"a": {"c": 1}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers: 6", "layers: 1000000000"),
        ("layers: 6", "layers: 900"),
        ("dim: 256", "dim: 1073741824"),
        ("dim: 256", "dim: 8192"),
        ("dim: 256", "dim: 0"),
        ("heads: 4", "heads: 0"),
        ("heads: 4", "heads: -4"),
        ("patch: 2", "patch: 0"),
        ("text_length: 16", "text_length: 1000000000000"),
        ("fps: 16.0", "fps: .inf"),
        ("fps: 16.0", "fps: .nan"),
        ("shift: 5.0", "shift: .inf"),
        ("shift: 5.0", "shift: 1" + "0" * 400),
        ("height: 8", "height: 100000000000"),
        ("frames: 12", "frames: 1200000000000"),
        ("name: tiny", "name: " + "x" * 100_000 + "\nname2: tiny"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path: Path, old: str, new: str) -> None:
    folder = find("tiny/frame-2step")
    text = (folder / "config.yaml").read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new, 1))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    refused(lambda: load_export(tmp_path))


@pytest.mark.parametrize(
    "change", [("dim: 16", "dim: 65536"), ("res_blocks: 1", "res_blocks: 60"), ("z: 16", "z: 999")]
)
def test_a_codec_of_absurd_size_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    folder = find("tiny/frame-2step").parent
    text = (folder / "codec.yaml").read_text()
    assert change[0] in text
    (tmp_path / "codec.yaml").write_text(text.replace(*change, 1))
    (tmp_path / "codec.safetensors").symlink_to(folder / "codec.safetensors")
    refused(lambda: load_codec(tmp_path))


# ------------------------------------------------------------------------------------------------------------- pickles


class Poison:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def zipped(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


@pytest.mark.parametrize(
    ("call", "named"), [(os.system, "posix.system"), (eval, "eval"), (print, "print"), (os.getcwd, "posix.getcwd")]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_poisoned_file_is_named_for_what_it_is(
    tmp_path: Path, call: Callable[..., object], named: str, protocol: int
) -> None:
    content = pickle.dumps({"a": Poison(call, "exit")}, protocol=protocol)
    (tmp_path / "plain.pt").write_bytes(content)
    zipped(tmp_path / "zip.pt", content)
    for name in ("plain.pt", "zip.pt"):
        refused(lambda name=name: read_tensors(tmp_path / name), name, "code or objects other than tensors", "refused")
        with pytest.raises(ValueError) as caught:
            read_tensors(tmp_path / name)
        advice = ("weights_only", "add_safe_globals", "corrupt", "damaged")
        assert not any(word in str(caught.value) for word in advice)
        assert named in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_an_archive_unpacks_to_no_more_than_it_is(tmp_path: Path) -> None:
    refused(lambda: read_tensors(zipped(tmp_path / "b.pt", bytes(1 << 20), zipfile.ZIP_DEFLATED)), "compressed")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "t.pt")
    refused(lambda: read_tensors(tmp_path / "t.pt"), "TorchScript")


def odd_tensors() -> dict[str, object]:
    storage = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are on their way out
        quantised = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
    return {
        "terabytes of one value": torch.as_strided(storage, (2**20, 2**20), (0, 0)),
        "a sparse tensor": torch.eye(2).to_sparse(),
        "a quantised tensor": quantised,
        "without values": torch.zeros(2, device="meta"),
    }


@pytest.mark.parametrize("name", odd_tensors())
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_are_plain_and_as_long_as_the_file_says(tmp_path: Path, name: str, nested: bool) -> None:
    value = odd_tensors()[name]
    torch.save({"generator": {ESCAPE: value}} if nested else {ESCAPE: value}, tmp_path / "a.pt")
    refused(lambda: read_tensors(tmp_path / "a.pt"), "a.pt", r"\x1b" if "refused" not in name else "")


def test_containers_in_each_other_are_read_to_a_depth(tmp_path: Path) -> None:
    value: Any = torch.zeros(1)
    for _ in range(60):
        value = {"a": value}
    torch.save(value, tmp_path / "deep.pt")
    refused(lambda: read_tensors(tmp_path / "deep.pt"), "deep")
    value = [torch.zeros(1)]
    for _ in range(25):
        value = [value, value, value]  # 3^25 paths, 25 lists
    torch.save({"a": value, 3: torch.zeros(1), "step": 7}, tmp_path / "wide.pt")
    assert read_tensors(tmp_path / "wide.pt")["step"] == 7
    refused(lambda: read_network(tmp_path / "wide.pt"), "names are texts")


# ---------------------------------------------------------------------------------------------------------- everything


def shown_is_printable(text: str) -> None:
    assert shown(text).isprintable() and len(shown(text, 60)) <= 600


def test_what_is_shown_is_printable_and_short() -> None:
    for text in (ESCAPE, "\ud800", "x" * 10**6, "\u2066abc", "a\u0000b", "é", "日本"):
        shown_is_printable(text)
    assert shown("é 日本") == "é 日本" and shown(10**5000) == "a int"


def test_headers_and_configs_have_a_ceiling(tmp_path: Path) -> None:
    headed(tmp_path / "m.safetensors", b'{"a":"' + b"x" * 60_000_000 + b'"}')
    headed(tmp_path / "n.safetensors", b"{" + b'"":[],' * 9_000_000 + b'"":1}')
    (tmp_path / "config.yaml").write_text(YAMLS["aliases"])
    (tmp_path / "config.json").write_text('{"a":[' + "[]," * 5_000_000 + "1]}")
    (tmp_path / "big.yaml").write_bytes(b"a: " + b"1" * (200 << 20))
    work = """
for name, read in (("m.safetensors", read_header), ("n.safetensors", read_header), ("config.json", read_json),
                   ("config.yaml", config.read), ("big.yaml", config.read)):
    try:
        read(arguments[0] + "/" + name)
    except ValueError as error:
        print(len(str(error)) < 700)
"""
    setup = """
from causalreel import config
from causalreel.foreign import read_json
from causalreel.headers import read_header
"""
    cost = work_within(400, work, str(tmp_path), setup=setup)
    assert cost.output.split() == ["True"] * 5


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random changes: bits, pieces cut out, doubled, moved, replaced by what breaks parsers."""
    odd = [
        b"",
        b"\0",
        b"{",
        b"[" * 300,
        b"}",
        b'"',
        b"null",
        b"-1",
        b"9" * 30,
        b"1e999",
        b"\xff",
        b"\x1b[2J",
        b"&a *a",
        b"!!",
    ]
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(len(out) + 1)
        if chance.random() < 0.7:
            at = min(at, chance.randrange(600))  # where the structure is
        end = min(len(out), at + chance.choice([1, 1, 2, 8, 40, 400]))
        match chance.randrange(6):
            case 0:
                if at < len(out):
                    out[at] ^= 1 << chance.randrange(8)
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = out[at:end] * chance.choice([1, 1, 3, 50])
            case 3:
                out[at:end] = chance.choice(odd)
            case 4:
                out[at:at] = chance.choice(odd)
            case 5:
                out = out[: max(at, 1)] if chance.random() < 0.3 else out
    return bytes(out)


def seeds(folder: Path) -> dict[str, tuple[bytes, Callable[[Path], object]]]:
    """Kind of file -> a small valid one and what reads it."""
    model = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=1, text_dim=8, text_length=4, freq_dim=16, channels=2)
    from causalreel.nn.dit import DiT

    state = dict(DiT(model).state_dict())
    write_tensors(folder / "s.safetensors", state, {"format": "pt"})
    torch.save({"generator": state, "step": 3}, folder / "s.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "shard.safetensors")}
    facts = {"_class_name": "WanModel", "num_heads": 2, "eps": 1e-6, "text_len": 4}
    write_tensors(folder / "shard.safetensors", state)
    tiny = find("tiny/frame-2step")
    vocabulary = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    tokens = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": vocabulary}

    def beside(path: Path, name: str, read: Callable[[], object]) -> object:
        (path.parent / name).write_bytes(path.read_bytes())
        return read()

    found: dict[str, tuple[bytes, Callable[[Path], object]]] = {
        "w.safetensors": ((folder / "s.safetensors").read_bytes(), read_network),
        "v.safetensors": ((folder / "s.safetensors").read_bytes(), load_wan_vae),
        "t.safetensors": ((folder / "s.safetensors").read_bytes(), load_taehv),
        "w.pt": ((folder / "s.pt").read_bytes(), read_network),
        "u.pt": ((folder / "old.pt").read_bytes(), load_umt5),
        "m.index.json": (json.dumps(index).encode(), read_network),
        "a.json": (
            json.dumps(facts).encode(),
            lambda p: beside(p, "config.json", lambda: read_network(p.parent / "s.safetensors")),
        ),
        "c.yaml": ((tiny / "config.yaml").read_bytes(), lambda p: config.load(p, Export, alone=True)),
        "k.yaml": (
            (tiny.parent / "codec.yaml").read_bytes(),
            lambda p: beside(p, "codec.yaml", lambda: load_codec(p.parent)),
        ),
        "j.json": (
            json.dumps(tokens).encode(),
            lambda p: beside(p, "tokenizer.json", lambda: Tokenizer(p.parent)("a")),
        ),
    }
    (folder / "codec.safetensors").write_bytes((tiny.parent / "codec.safetensors").read_bytes())
    return found


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_files_load_or_are_refused_in_one_short_line(tmp_path: Path) -> None:
    kinds = seeds(tmp_path)
    count = examples(300)
    base = 0 if count == 300 else random.SystemRandom().randrange(2**32)
    for number in range(base, base + count):
        chance = random.Random(number)
        name = chance.choice(sorted(kinds))
        data, read = kinds[name]
        path = tmp_path / f"f{name}"
        path.write_bytes(mutated(data, chance))
        try:
            read(path)
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message and message.isprintable() and len(message) < 1500, (number, name, message)
        except Exception as error:
            raise AssertionError(f"input {number} of {name}: {type(error).__name__}: {error}") from error
        for leftover in ("config.json", "codec.yaml", "tokenizer.json"):
            (tmp_path / leftover).unlink(missing_ok=True)


def test_the_seeds_of_the_fuzz_test_are_valid(tmp_path: Path) -> None:
    kinds = seeds(tmp_path)
    for name in ("w.safetensors", "w.pt", "m.index.json", "a.json", "c.yaml", "k.yaml"):
        (tmp_path / f"f{name}").write_bytes(kinds[name][0])
        kinds[name][1](tmp_path / f"f{name}")
    assert io.BytesIO(kinds["u.pt"][0]).read(1) == b"\x80" and read_header(tmp_path / "s.safetensors").entries
