"""The UMT5 text encoder: arithmetic, foreign names, files, tokens, padding, placement and what the cache spares."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from causalreel.text import umt5
from causalreel.text.umt5 import NEGATIVE_PROMPT, Placement, Tokenizer, Tokens, UMT5Sizes, UMT5TextEncoder, embed
from causalreel.types import TextEncoder
from causalreel.verify import run
from causalreel.verify.runner import ERROR, FAIL, PASS
from causalreel.weights import umt5_files as files
from causalreel.weights.files import read_tensors, write_tensors

transformers = pytest.importorskip("transformers", reason="needs the extra wan")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra wan")
pytest.importorskip("ftfy", reason="needs the extra wan")

GOLDEN = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
SIZES = UMT5Sizes(
    vocab=300, dim=24, attention_dim=32, ffn_dim=40, heads=4, layers=2, buckets=8, max_distance=UMT5Sizes.max_distance
)
WORDS = ["▁", "▁a", "▁cat", "▁walks", "▁on", "▁grass", "c", "a", "t", "w", "l", "k", "s", "o", "n"]
FLOAT = Placement(dtype=torch.float32)


def official(seed: int = 0, sizes: UMT5Sizes = SIZES) -> dict[str, Tensor]:
    """Random weights under Wan2.1's names: attention neither flat nor hard, inputs so small that eps counts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in files.official_shapes(sizes).items():
        scale = 1.0 if "embedding" in name or "norm" in name else shape[-1] ** -0.5
        scale = 0.02 if name == "token_embedding.weight" else scale
        tensors[name] = torch.randn(shape, generator=generator) * scale
    return tensors


def make_tokenizer(folder: Path) -> Any:
    """A tokenizer in T5's manner whose file does more than T5's stock pipeline: a normaliser, byte fallback."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)] + [(word, -3.0) for word in WORDS]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace("dog", "cat")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    told = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(told))
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return made


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and tokenizer as in Wan2.1's folder."""
    folder = tmp_path_factory.mktemp("wan")
    torch.save(official(), folder / files.OFFICIAL_FILE)
    make_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def encoder_of(folder: Path, **how: Any) -> UMT5TextEncoder:
    return files.load_text_encoder(folder, **{"length": 12, "placement": FLOAT} | how)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def bucket(offset: int, count: int, reach: int) -> int:
    """Key position minus query position -> bucket: half for keys after, of each half the near ones exactly."""
    half = count // 2
    start, offset, exact = (half if offset > 0 else 0), abs(offset), half // 2
    if offset < exact:
        return start + offset
    return start + min(exact + int(math.log(offset / exact) / math.log(reach / exact) * (half - exact)), half - 1)


def forward(w: dict[str, Tensor], ids: Sequence[int], sizes: UMT5Sizes = SIZES) -> Tensor:
    """The encoder written out once more, from the facts of its paper and Wan2.1's names: ids (n) -> (n,E)."""
    x, n = w["token_embedding.weight"][list(ids)], len(ids)
    buckets = torch.tensor([[bucket(k - q, sizes.buckets, sizes.max_distance) for k in range(n)] for q in range(n)])
    for layer in range(sizes.layers):
        b = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blocks.{layer}.")}
        y = norm(x, b["norm1.weight"])
        q, k, v = ((y @ b[f"attn.{part}.weight"].T).view(n, sizes.heads, -1).transpose(0, 1) for part in "qkv")
        bias = b["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        y = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + y.transpose(0, 1).reshape(n, -1) @ b["attn.o.weight"].T
        y = norm(x, b["norm2.weight"])
        gate = functional.gelu(y @ b["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ b["ffn.fc1.weight"].T)) @ b["ffn.fc2.weight"].T
    return norm(x, w["norm.weight"])


def test_arithmetic_and_names_meet_the_formulas(wan_folder: Path) -> None:
    model = files.load_umt5(wan_folder, dtype=torch.float32)
    ids = [5, 299, 17, 17, 3, 200, 41, 8, 150, 77, 1]
    wanted = forward(official(), ids)
    got = embed(model, ids, torch.device("cpu"))
    assert got.shape == (11, SIZES.dim) and not got.requires_grad
    assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_max_distance_reaches_the_network(wan_folder: Path) -> None:
    ids = list(range(1, 60))
    near, far = (
        embed(files.load_umt5(wan_folder, dtype=torch.float32, max_distance=reach), ids, torch.device("cpu"))
        for reach in (16, 128)
    )
    assert (near - far).abs().max() > 1e-3
    wanted = forward(official(), ids, UMT5Sizes(**{**vars(SIZES), "max_distance": 16}))
    assert (near - wanted).abs().max() < 2e-5 * wanted.abs().max()


# ---- names and files -------------------------------------------------------------------------------------------------


def test_official_key_list_of_the_full_size() -> None:
    sizes = UMT5Sizes()
    shapes = files.official_shapes(sizes)
    assert len(shapes) == 242 and sum(math.prod(shape) for shape in shapes.values()) == 5_680_910_336
    path = GOLDEN / "c14_official_key_shapes.json"
    if path.is_file():
        recorded = json.loads(path.read_text())["shapes"]["umt5_xxl_encoder"]
        assert {name: list(shape) for name, shape in shapes.items()} == recorded
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = umt5.build(files.sizes_of(meta))
    umt5.fill(model, files.to_transformers(meta))
    assert len(list(model.parameters())) == 242
    back = files.to_official(dict(model.named_parameters()))
    assert {name: tuple(value.shape) for name, value in back.items()} == shapes


def test_names_there_and_back_are_the_identity() -> None:
    tensors = official()
    back = files.to_official(files.to_transformers(tensors))
    assert list(back) == list(tensors) and all(back[name] is tensors[name] for name in tensors)
    for bad in ("blocks.0.attn.q.bias", "blocks.x.norm1.weight", "shared.weight", "decoder.norm.weight"):
        with pytest.raises(ValueError, match=r"no name of Wan2\.1's text encoder"):
            files.transformers_name(bad)
    with pytest.raises(ValueError, match="no name of a UMT5 encoder"):
        files.official_name("decoder.block.0.layer.0.layer_norm.weight")


def save_pretrained(folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """The same weights as transformers itself writes them, in one file or several."""
    model = umt5.build(SIZES)
    umt5.fill(model, {name: value.to(dtype) for name, value in files.to_transformers(official()).items()})
    total = sum(value.numel() * value.element_size() for value in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // shards + 1 if shards > 1 else "50GB")
    assert len(list(folder.glob("*.safetensors"))) >= shards
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_folders_of_transformers_and_diffusers_are_read(shards: int, tmp_path: Path) -> None:
    save_pretrained(tmp_path / "text_encoder", shards=shards)
    make_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path, tmp_path / "text_encoder"):
        got = files.read_umt5(path)
        assert got.keys() == official().keys() and all(torch.equal(got[name], t) for name, t in official().items())
        assert files.find_tokenizer(path).resolve() == tmp_path / "tokenizer"
    encoder = encoder_of(tmp_path)
    ids = Tokenizer(tmp_path / "tokenizer", 12)("a cat").ids
    assert torch.allclose(encoder.encode(["a cat"])[0, : len(ids)], forward(official(), ids), atol=1e-4)


def test_the_config_beside_the_weights_is_heard(tmp_path: Path) -> None:
    folder, ids = save_pretrained(tmp_path / "text_encoder"), list(range(1, 60))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 16}))
    got = embed(files.load_umt5(tmp_path, dtype=torch.float32), ids, torch.device("cpu"))
    wanted = forward(official(), ids, UMT5Sizes(**{**vars(SIZES), "max_distance": 16}))
    assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()
    for change in ({"model_type": "t5"}, {"feed_forward_proj": "gated-silu"}, {"layer_norm_epsilon": 1e-5}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"config.json: {next(iter(change))} is"):
            files.load_umt5(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        files.load_umt5(folder)


def test_the_config_of_wan_is_not_the_encoders(wan_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(wan_folder, tmp_path / "wan")
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"model_type": "t2v", "dim": 1536}))
    for path in (tmp_path / "wan", tmp_path / "wan" / files.OFFICIAL_FILE):
        assert files.stated_max_distance(path) == 128


def test_the_embedding_may_come_under_both_names_if_they_agree(tmp_path: Path) -> None:
    path, names = tmp_path / "umt5.safetensors", files.to_transformers(official())
    twice = names | {files.TIED: names["shared.weight"].clone()}
    write_tensors(path, twice | {"spiece_model": torch.zeros(9, dtype=torch.uint8)})
    assert files.read_umt5(path).keys() == official().keys()
    write_tensors(path, {name: value for name, value in twice.items() if name != "shared.weight"})
    assert files.read_umt5(path).keys() == official().keys()
    write_tensors(path, twice | {files.TIED: names["shared.weight"] + 1})
    with pytest.raises(ValueError, match="one table"):
        files.read_umt5(path)


def test_official_weights_stay_mapped_and_in_place(wan_folder: Path, tmp_path: Path) -> None:
    """In the file's own dtype nothing is copied, so 11 GB are not held twice; the embedding is one parameter."""
    path = tmp_path / "bf16.pth"
    torch.save({name: value.bfloat16() for name, value in official().items()}, path)
    given: list[int] = []

    def remember(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        given.extend(value.data_ptr() for value in tensors.values())
        fill(model, tensors)

    fill = umt5.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fill", remember)
        model = files.load_umt5(path)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * len(official())
    assert sorted(p.data_ptr() for p in model.parameters()) == sorted(given)
    text = Path("/proc/self/maps")
    if text.is_file():
        assert path.name in text.read_text()
    assert not any(p.requires_grad for p in model.parameters())


def test_files_of_old_pytorch_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(official(), path, _use_new_zipfile_serialization=False)
    assert files.read_umt5(path).keys() == official().keys()


def broken(tmp_path: Path, how: str) -> Path:
    tensors, path = official(), tmp_path / "encoder.pth"
    if how == "missing":
        del tensors["blocks.1.ffn.gate.0.weight"]
    elif how == "missing layer":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("blocks.0.")}
    elif how == "unexpected":
        tensors["blocks.1.attn.q.scale_weight"] = torch.ones(1)
    elif how == "shape":
        tensors["blocks.1.attn.o.weight"] = tensors["blocks.1.attn.o.weight"].T.contiguous()
    elif how == "integers":
        tensors["norm.weight"] = torch.ones(SIZES.dim, dtype=torch.long)
    elif how == "another network":
        tensors = {"blocks.0.self_attn.q.weight": torch.ones(2), "head.head.weight": torch.ones(2)}
    torch.save(tensors, path)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"1 names missing \(first: blocks.1.ffn.gate.0.weight\)"),
        ("missing layer", "not a UMT5 encoder"),
        ("unexpected", r"1 unexpected \(first: blocks.1.attn.q.scale_weight\)"),
        ("shape", r"blocks.1.attn.o.weight is \(32, 24\), expected \(24, 32\)"),
        ("integers", r"norm.weight is torch.int64, expected floating point"),
        ("another network", "not a UMT5 encoder.*the file looks like"),
        ("cut off", "damaged"),
    ],
)
def test_other_files_are_refused(how: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        files.load_umt5(broken(tmp_path, how))
    assert "encoder.pth" in str(caught.value)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "sharded", shards=3)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or was cut off"):
        files.read_umt5(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the .*missing: {shard.name}.*download again"):
        files.read_umt5(folder)
    with pytest.raises(ValueError, match="text encoder not found"):
        files.read_umt5(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"expected {files.OFFICIAL_FILE}"):
        files.read_umt5(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer beside"):
        files.find_tokenizer(folder)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_tokenizer_file(tmp_path: Path) -> None:
    """Stock pipelines differ in both: characters outside the vocabulary, and the file's own normaliser."""
    made = make_tokenizer(tmp_path)
    tokenize = Tokenizer(tmp_path, 64)
    for text in ("a cat walks on grass", "a dog 猫 on", "", "a  cat"):
        assert tokenize(text).ids == tuple(made.encode(text).ids)
    assert 2 not in tokenize("猫").ids and tokenize("dog").ids == tokenize("cat").ids and tokenize("").ids == (1,)


@pytest.mark.parametrize(("words", "total", "kept"), [(4, 5, 5), (7, 8, 8), (8, 9, 8), (20, 21, 8)])
def test_truncation_keeps_the_end_token(words: int, total: int, kept: int, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokens = Tokenizer(tmp_path, 8)(" ".join(["cat"] * words))
    assert tokens.total == total and len(tokens.ids) == kept and tokens.ids[-1] == 1 and 1 not in tokens.ids[:-1]


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer.json"):
        Tokenizer(tmp_path)("a")
    made = make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer(tmp_path)("a")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="does not end prompts"):
        Tokenizer(tmp_path)("a")


# ---- the encoder -----------------------------------------------------------------------------------------------------


def test_shapes_padding_and_protocol(wan_folder: Path) -> None:
    encoder = encoder_of(wan_folder)
    assert isinstance(encoder, TextEncoder) and (encoder.length, encoder.width) == (12, SIZES.dim)
    assert encoder.complete("  any text", 3) == "  any text"
    text = encoder.encode(["a cat walks", "", "cat " * 30])
    assert text.shape == (3, 12, SIZES.dim) and text.dtype == torch.float32 and not text.requires_grad
    for row, count in enumerate((4, 1, 12)):
        assert text[row, :count].abs().sum(-1).min() > 0 and text[row, count:].abs().sum() == 0
    assert encoder.encode([]).shape == (0, 12, SIZES.dim)
    with pytest.raises(TypeError, match="sequence of strings"):
        encoder.encode("a cat")


def test_padding_is_left_out_without_changing_the_rest(wan_folder: Path) -> None:
    """What released code computes: a padded batch with masked keys, then zeros."""
    encoder = encoder_of(wan_folder)
    model, tokenize = files.load_umt5(wan_folder, dtype=torch.float32), Tokenizer(wan_folder / "google/umt5-xxl", 12)
    rows = [tokenize(text).ids for text in ("a cat walks on grass", "a")]
    ids = torch.tensor([[*row, *[0] * (12 - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (12 - len(row)) for row in rows])
    padded = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert (encoder.encode(["a cat walks on grass", "a"]) - padded).abs().max() < 1e-5 * padded.abs().max()


def test_prompts_do_not_influence_each_other_and_are_cleaned(wan_folder: Path) -> None:
    encoder = encoder_of(wan_folder, placement=Placement())
    together = encoder.encode(["a cat", "cat " * 30, "a cat walks on grass", "  a\ncat "])
    assert together.dtype == torch.bfloat16
    for row, text in enumerate(["a cat", "cat " * 30, "a cat walks on grass", "a cat"]):
        assert torch.equal(together[row : row + 1], encoder.encode([text]))


def test_null_is_the_negative_prompt(wan_folder: Path) -> None:
    encoder = encoder_of(wan_folder)
    assert torch.equal(encoder.null(2), encoder.encode([NEGATIVE_PROMPT] * 2))
    plain = encoder_of(wan_folder, negative_prompt="")
    null = plain.null(3)
    assert torch.equal(null, plain.encode([""] * 3)) and null[:, 1:].abs().sum() == 0
    assert not torch.equal(null[:1], encoder.null(1))
    null.zero_()  # the caller's own
    assert plain.null(1).abs().sum() > 0


def test_truncation_is_logged_once_also_for_cached_prompts(
    wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        encoder = encoder_of(wan_folder, cache=tmp_path)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                encoder.encode(["cat " * 30, "cat"])
        (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("causalreel")]
        assert told.startswith("prompt has 31 tokens, only the first 12 count: 'cat cat")


def test_a_tokenizer_of_another_model_is_refused(wan_folder: Path) -> None:
    encoder = encoder_of(wan_folder)
    encoder._tokenize = lambda text: Tokens((SIZES.vocab, 1), 2)
    with pytest.raises(ValueError, match="token 300, the encoder knows 300: they do not belong together"):
        encoder.encode(["a"])


def test_bad_settings_are_refused(wan_folder: Path) -> None:
    with pytest.raises(ValueError, match="offload must be one of keep, cpu, release, host; got 'disk'"):
        Placement(offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float32"):
        Placement(dtype=torch.float16)
    wide = UMT5TextEncoder(lambda: files.load_umt5(wan_folder), lambda text: Tokens((1,), 1))
    assert wide.negative_prompt == NEGATIVE_PROMPT and wide.length == 512
    with pytest.raises(ValueError, match="width 24, expected 4096"):
        wide.encode(["a"])


# ---- what the cache spares -------------------------------------------------------------------------------------------


def count_loads(encoder: UMT5TextEncoder) -> list[int]:
    loads, load = [0], encoder._load

    def counted() -> nn.Module:
        loads[0] += 1
        return load()

    encoder._load = counted
    return loads


def test_a_hit_loads_nothing(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder_of(wan_folder, cache=tmp_path)
    assert not first.is_loaded
    wanted = first.encode(["a cat", "grass"])
    assert first.is_loaded
    second = encoder_of(wan_folder, cache=tmp_path)
    loads = count_loads(second)
    monkeypatch.setitem(sys.modules, "transformers", None)  # not even needed
    assert torch.equal(second.encode(["grass", " a  cat", "grass"]), wanted[[1, 0, 1]])
    assert loads == [0] and not second.is_loaded
    monkeypatch.undo()
    second.encode(["a cat", "a cat walks"])
    assert loads == [1]


def test_another_dtype_length_or_encoder_is_a_miss(wan_folder: Path, tmp_path: Path) -> None:
    encoder_of(wan_folder, cache=tmp_path).encode(["a cat"])
    for how in ({"length": 11}, {"placement": Placement()}):
        encoder = encoder_of(wan_folder, cache=tmp_path, **how)
        loads = count_loads(encoder)
        encoder.encode(["a cat"])
        assert loads == [1]
    other = tmp_path / "other"
    other.mkdir()
    torch.save(official(1), other / "encoder.pth")
    changed = encoder_of(other / "encoder.pth", tokenizer=wan_folder / "google/umt5-xxl", cache=tmp_path)
    assert not torch.equal(changed.encode(["a cat"]), encoder_of(wan_folder).encode(["a cat"]))


def test_a_corrupt_entry_is_computed_again(wan_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = encoder_of(wan_folder, cache=tmp_path).encode(["a cat"])
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    encoder = encoder_of(wan_folder, cache=tmp_path)
    loads = count_loads(encoder)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encoder.encode(["a cat"]), wanted)
    assert loads == [1] and "written again" in caplog.text
    again = encoder_of(wan_folder, cache=tmp_path)
    assert torch.equal(again.encode(["a cat"]), wanted) and not again.is_loaded


def test_fingerprints_tell_encoders_apart_and_not_places(wan_folder: Path, tmp_path: Path) -> None:
    tokenizer = wan_folder / "google/umt5-xxl"
    plain = files.fingerprint(wan_folder, tokenizer)
    copy = tmp_path / "renamed.pth"
    shutil.copyfile(wan_folder / files.OFFICIAL_FILE, copy)
    shutil.copytree(tokenizer, tmp_path / "tok")
    assert files.fingerprint(copy, tmp_path / "tok") == plain
    tensors = official()
    tensors["blocks.1.norm2.weight"][3] += 1e-3
    torch.save(tensors, copy)
    assert files.fingerprint(copy, tokenizer) != plain
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    assert files.fingerprint(wan_folder, tmp_path / "tok") != plain


def test_one_changed_number_of_a_large_file_changes_the_fingerprint(tmp_path: Path) -> None:
    """Between the samples too, through the checksums at the end of a .pth file."""
    prints = []
    for value in (0.0, 1.0):
        table = torch.zeros(8_000_000)
        table[4_321_987] = value
        torch.save({"a": table}, tmp_path / "a.pth")
        prints.append(files.fingerprint(tmp_path / "a.pth", tmp_path))
    assert prints[0] != prints[1]


# ---- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offload", "stays"), [("keep", True), ("cpu", True), ("host", True), ("release", False)])
def test_weights_are_released_when_asked(offload: Any, stays: bool, wan_folder: Path) -> None:
    encoder = encoder_of(wan_folder, placement=Placement(offload=offload, dtype=torch.float32))
    loads = count_loads(encoder)
    wanted = encoder.encode(["a cat"])
    assert encoder.is_loaded == stays
    assert torch.equal(encoder.encode(["a cat"]), wanted) and loads == [1 if stays else 2]
    encoder.release()
    assert not encoder.is_loaded and torch.equal(encoder.encode(["a cat"]), wanted)


def test_weights_beside_the_model_are_used_and_complete(wan_folder: Path) -> None:
    """The copy on a device stands in for every parameter: with it a model without storage computes."""
    model = files.load_umt5(wan_folder, dtype=torch.float32)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    assert len(weights) == len(official())
    empty = umt5.build(SIZES)
    empty.set_input_embeddings(empty.get_input_embeddings())  # type: ignore[operator]
    cpu = torch.device("cpu")
    assert torch.equal(embed(empty, [4, 5, 1], cpu, weights), embed(model, [4, 5, 1], cpu))
    own, before = [p.data_ptr() for p in model.parameters()], embed(model, [4, 5, 1], cpu)
    weights["shared.weight"] += 1
    assert not torch.equal(embed(model, [4, 5, 1], cpu, weights), before)
    assert [p.data_ptr() for p in model.parameters()] == own  # the copy leaves nothing behind
    assert torch.equal(embed(model, [4, 5, 1], cpu), before)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, free: int, has_bf16: bool = True) -> None:
    monkeypatch.setattr(umt5, "free_bytes", lambda device: free)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)


def test_a_full_or_old_gpu_sends_encoding_to_the_cpu(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = files.load_umt5(wan_folder)
    needed = umt5.needed_bytes(model, 512)
    assert needed > sum(p.numel() * 2 for p in model.parameters()) + umt5.SPARE_BYTES
    told = {offload: Placement("cuda", offload) for offload in ("keep", "cpu", "release", "host")}
    choose = {
        name: UMT5TextEncoder(lambda: model, lambda text: Tokens((1,), 1), width=24, placement=where)._choose
        for name, where in told.items()
    }
    on_a_gpu(monkeypatch, free=needed)
    assert [choose[name](model).type for name in choose] == ["cuda", "cuda", "cuda", "cpu"]
    assert not caplog.records
    on_a_gpu(monkeypatch, free=needed - 2**30)
    with caplog.at_level(logging.WARNING):
        assert [choose[name](model).type for name in ("cpu", "release", "host")] == ["cpu"] * 3
    assert len(caplog.records) == 2 and "1.0 GiB too little" in caplog.text
    with pytest.raises(ValueError, match=r"1\.0 GiB too little; offload='cpu'.*offload='host'"):
        choose["keep"](model)
    on_a_gpu(monkeypatch, free=needed, has_bf16=False)
    assert choose["cpu"](model).type == "cpu"
    with pytest.raises(ValueError, match="no bfloat16"):
        choose["keep"](model)


def test_full_size_needs_what_it_should() -> None:
    """11.4 GB of weights and well below one more for a prompt: room on a 24 GB card beside a 1.3B denoiser."""
    model = umt5.build().to(torch.bfloat16)
    model.set_input_embeddings(model.get_input_embeddings())  # type: ignore[operator]
    assert 10.5 * 2**30 < umt5.needed_bytes(model, 512) < 11.8 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("offload", ["keep", "cpu", "release", "host"])
def test_gpu_agrees_and_gives_memory_back(offload: Any, wan_folder: Path) -> None:
    wanted = encoder_of(wan_folder).encode(["a cat walks", "grass"])
    encoder = encoder_of(wan_folder, placement=Placement("cuda", offload, torch.float32))
    before = torch.cuda.memory_allocated()
    text = encoder.encode(["a cat walks", "grass"])
    assert text.device.type == "cuda" and (text.cpu() - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.equal(encoder.encode(["grass"])[0], text[1])
    weights = sum(value.numel() * 4 for value in official().values())
    held = torch.cuda.memory_allocated() - before
    assert (held >= weights) == (offload == "keep")


# ---- recorded numbers ------------------------------------------------------------------------------------------------


def write_case(folder: Path, change: dict[str, Any] | None = None) -> Path:
    """A case of the recorded kind, from the formulas above, with other sizes than the released recording."""
    tensors, ids = official(), torch.tensor([[7, 9, 250, 1, 0, 0, 0], [3, 4, 5, 6, 7, 8, 1]])
    lengths = [4, 7]
    wanted = torch.zeros(2, 7, SIZES.dim)
    for row, count in enumerate(lengths):
        wanted[row, :count] = forward(tensors, ids[row, :count].tolist())
    numbers = torch.tensor([bucket(offset, SIZES.buckets, SIZES.max_distance) for offset in range(-150, 151)])
    mask = torch.tensor([[1] * count + [0] * (7 - count) for count in lengths])
    recorded = {
        "in.ids": ids,
        "in.mask": mask,
        "out.prompt_embeds": wanted,
        "out.bucket_of_relative_position_-150..150": numbers,
    }
    recorded |= {name: value for name, value in (change or {}).items() if isinstance(value, Tensor)}
    model = {"vocab": SIZES.vocab, "dim": SIZES.dim, "num_heads": SIZES.heads, "num_buckets": SIZES.buckets}
    described = {
        "case": "c12_small",
        "config": {"weights": "weights_small", "max_distance": SIZES.max_distance, "number_of_official_keys": 22},
        "model": model | (change or {}).get("model", {}),
        "tensors": {},
        "tolerance": {"suggested_max_abs_error_relative_to_max_abs_output": 2e-5},
    }
    described["config"] |= (change or {}).get("config", {})
    write_tensors(folder / "weights_small.safetensors", tensors)
    write_tensors(folder / "c12_small.safetensors", recorded)
    (folder / "c12_small.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, PASS),
        ({"config": {"max_distance": 40}}, FAIL),
        ({"config": {"number_of_official_keys": 23}}, FAIL),
        ({"config": {"key_map_official_to_transformers_UMT5EncoderModel": [["norm.weight", "shared.weight"]]}}, FAIL),
        ({"model": {"num_heads": 8}}, FAIL),
        ({"model": {"shared_pos": True}}, ERROR),
        ({"in.mask": torch.ones(2, 7, dtype=torch.long)}, FAIL),
        ({"in.ids": torch.tensor([[7, 9, 250, 1, 0, 0, 0], [3, 4, 5, 6, 8, 7, 1]])}, FAIL),
    ],
)
def test_verify_meets_a_case_and_can_fail(change: dict[str, Any], status: str, tmp_path: Path) -> None:
    (result,) = run(write_case(tmp_path, change))
    assert result.status == status, result


def test_verify_names_the_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (result,) = run(tmp_path)
    assert result.status == ERROR and "pip install 'causalreel[wan]'" in result.detail


def recorded() -> list[Path]:
    return sorted(GOLDEN.glob("c12_*.json")) if GOLDEN.is_dir() else []


@pytest.mark.skipif(not recorded(), reason=f"no recorded case in {GOLDEN} (set CAUSALREEL_GOLDEN)")
def test_recorded_weights_moved_a_little_fail(tmp_path: Path) -> None:
    for path in recorded():
        name = json.loads(path.read_text())["config"]["weights"]
        for source in (path, path.with_suffix(".safetensors")):
            shutil.copyfile(source, tmp_path / source.name)
        weights = read_tensors(GOLDEN / f"{name}.safetensors")
        weights["blocks.1.pos_embedding.embedding.weight"] = weights["blocks.0.pos_embedding.embedding.weight"].clone()
        write_tensors(tmp_path / f"{name}.safetensors", weights)
        assert [result.status for result in run(tmp_path)] == [FAIL]
