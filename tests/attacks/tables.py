"""Attacks by the manifest: encodings that lie, numbers that are none, names that lead elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack

from runtime.artifact.encoding import canonical, sha256
from runtime.artifact.manifest import (
    MANIFEST_NAME,
    CachedValue,
    ConversionEntry,
    DimEntry,
    FileEntry,
    InputEntry,
    LeafKind,
    TensorEntry,
)
from tests.attacks.attack import Attack
from tests.runtime.artifacts import FIRST, files, manifest, write


def changed(name: str, reason: str, **changes: Any) -> Attack:
    """The usual artifact with other entries in its manifest."""
    return Attack(name, reason, lambda root: write(root, **changes))


def replaced(name: str, reason: str, contents: Mapping[str, bytes], **changes: Any) -> Attack:
    """The usual artifact with other files, all of them listed with right digests."""
    return Attack(name, reason, lambda root: write(root, {**files(), **contents}, **changes))


def encoded(name: str, reason: str, change: Callable[[dict[str, Any]], object]) -> Attack:
    """The usual artifact with a manifest that was changed after it was encoded, its digest made to fit."""

    def make(root: Path) -> None:
        write(root)
        plain: dict[str, Any] = msgpack.unpackb(manifest().to_bytes())
        del plain["digest"]
        change(plain)
        packed = msgpack.packb({key: plain[key] for key in sorted(plain)})
        plain["digest"] = sha256(packed)
        (root / MANIFEST_NAME).write_bytes(msgpack.packb({key: plain[key] for key in sorted(plain)}))

    return Attack(name, reason, make)


def absent(name: str, reason: str = "has the invalid absent number", **changes: Any) -> Attack:
    """The usual artifact with one more input, for which a number stands."""
    entry: dict[str, Any] = {"name": "types", "dtype": "int64", "shape": ("batch", "sequence"), "absent": 0}
    more = InputEntry(**(entry | changes))
    return changed(name, reason, inputs=(*manifest().inputs, more))


def raw(name: str, reason: str, data: Callable[[], bytes]) -> Attack:
    """The usual artifact with these bytes for a manifest."""

    def make(root: Path) -> None:
        write(root)
        (root / MANIFEST_NAME).write_bytes(data())

    return Attack(name, reason, make)


def model(name: str, reason: str, **changes: Any) -> Attack:
    return changed(name, reason, model=replace(manifest().model, **changes))


def parameter(name: str, reason: str, **changes: Any) -> Attack:
    weight = replace(manifest().parameters["head.weight"], **changes)
    return changed(name, reason, parameters={**manifest().parameters, "head.weight": weight})


def constants(name: str, reason: str, header: bytes, body: bytes = bytes(8), length: int | None = None) -> Attack:
    """A safetensors file with this header."""
    data = struct.pack("<Q", len(header) if length is None else length) + header + body
    return replaced(name, reason, {"constants.safetensors": data})


def _without_digest() -> dict[str, Any]:
    plain: dict[str, Any] = msgpack.unpackb(manifest().to_bytes())
    del plain["digest"]
    return plain


def _doubled() -> bytes:
    """A map that holds `targets_per_subgraph` twice."""
    good = manifest().to_bytes()
    more = b"\xb4targets_per_subgraph\x01"
    return b"\xde" + (int.from_bytes(good[1:3], "big") + 1).to_bytes(2, "big") + good[3:] + more


def _cached() -> CachedValue:
    return CachedValue(subgraph=0, module="layers.0", kind="Attention", part="k", name="add", after="add", heads=2)


def cached(name: str, reason: str, changes: Mapping[str, Any]) -> Attack:
    """A module whose keys are not what a program has; its values are."""
    return changed(name, reason, cached=(replace(_cached(), **changes), replace(_cached(), part="v")))


_NO_VALUE, _NO_MODULE = "does not compute the cached values", "is invalid, or "
CACHED: list[tuple[str, str, dict[str, Any]]] = [
    ("a cached value that no statement makes", _NO_VALUE, {"name": "nowhere"}),
    ("a cached value that is an input", _NO_VALUE, {"name": "x", "after": "x"}),
    ("a cached value that is the run", _NO_VALUE, {"name": "run", "after": "add"}),
    ("a cached value that is the model", _NO_VALUE, {"name": "self", "after": "add"}),
    ("a cached value that is code", _NO_VALUE, {"name": "__import__('os')", "after": "add"}),
    ("a cached value before it is made", _NO_VALUE, {"name": "layers_0", "after": "add"}),
    ("a cached value after it is gone", _NO_VALUE, {"name": "constant_0", "after": "layers_0"}),
    ("a cached value after no statement", _NO_VALUE, {"after": "nowhere"}),
    ("a cached value of no subgraph", _NO_MODULE, {"subgraph": 9}),
    ("a cached value of a negative subgraph", _NO_MODULE, {"subgraph": -1}),
    ("a cached value of another subgraph's module", _NO_MODULE, {"subgraph": 1}),
    ("a cached value of a module that is not there", _NO_MODULE, {"module": "layers.7"}),
    ("a cached value of the whole model", _NO_MODULE, {"module": ""}),
    ("a cached value of an unknown part", _NO_MODULE, {"part": "__class__"}),
    ("a cached value of a class that is code", _NO_MODULE, {"kind": "a.b()"}),
    ("a cached value of a negative number of heads", _NO_MODULE, {"heads": -1}),
    ("a cached value of a billion heads", _NO_MODULE, {"heads": 2**30}),
]

ENCODING = [
    raw("an empty manifest", f"{MANIFEST_NAME} is damaged", lambda: b""),
    raw("a pickle for the manifest", "is damaged", lambda: b"\x80\x04cposix\nsystem\n(X\x0b\x00\x00\x00touch ownedtR."),
    raw("an extension type", "is not the manifest", lambda: b"\x81\xa1a\xc7\x04\x01evil"),
    raw("a time", "is not the manifest", lambda: b"\x81\xa1a\xd6\xff\x00\x00\x00\x00"),
    raw("depth", "is damaged", lambda: b"\x91" * 1_000_000),
    raw("depth of tables", "is damaged", lambda: b"\x81\xa1a" * 500_000),
    raw("a length of four billion", "is damaged", lambda: b"\xdd\xff\xff\xff\xff"),
    raw("a text of four gigabytes", "is damaged", lambda: b"\xdb\xff\xff\xff\xff"),
    raw("eight million empty lists", "Expected `object`", lambda: b"\xdd\x00\x80\x00\x00" + b"\x90" * 2**23),
    raw("duplicate keys", "is damaged", _doubled),
    raw("trailing bytes", "is damaged", lambda: manifest().to_bytes() + b"\x00"),
    raw(
        "another order of keys",
        "the keys are not in ascending order",
        lambda: msgpack.packb(dict(reversed(_without_digest().items()))),
    ),
    raw(
        "longer integers",
        "digest does not match",
        lambda: manifest().to_bytes().replace(b"subgraph\x01", b"subgraph\xcc\x01"),
    ),
    raw("no digest", "digest does not match", lambda: canonical(_without_digest())),
    encoded("a future version", "format version 3.0", lambda plain: plain.update(format_version=[3, 0])),
    encoded("a version beyond all numbers", "format version", lambda plain: plain.update(format_version=[2**63, 0])),
    encoded("an older version", "format version 1.0", lambda plain: plain.update(format_version=[1, 0])),
    encoded("eight million empty lists inside", "Expected `str`", lambda plain: plain.update(targets=[[]] * 2**23)),
    encoded("an entry that is unknown", "not the canonical encoding", lambda plain: plain.update(exec="os.system")),
    encoded(
        "not a number where a shape is expected", "float", lambda plain: plain["inputs"][0].update(shape=[float("nan")])
    ),
    encoded("infinity where a size is expected", "float", lambda plain: plain["files"][0].update(bytes=float("inf"))),
    encoded(
        "bytes where text is expected", f"{MANIFEST_NAME} is damaged", lambda plain: plain.update(input_key=b"abc")
    ),
    encoded(
        "a list where a table is expected", "got `array` - at `$.parameters`", lambda plain: plain.update(parameters=[])
    ),
    encoded(
        "true where a number is expected",
        "Expected `int`, got `bool`",
        lambda plain: plain.update(targets_per_subgraph=True),
    ),
]

VALUES = [
    changed("an input key of other ingredients", "does not match its ingredients", input_key="ab" * 32),
    changed("a negative shape", "shape [-1]", values={"layers_0": TensorEntry(dtype="model", shape=(-1,))}),
    changed(
        "a shape beyond all memory",
        f"shape [{2**60}]",
        values={"layers_0": TensorEntry(dtype="model", shape=(2**60,))},
    ),
    changed(
        "a shape that is code", "__import__('os')", values={"y": TensorEntry(dtype="", shape=("__import__('os')",))}
    ),
    changed("a shape with an exponent bomb", "9**9**9", values={"y": TensorEntry(dtype="", shape=("9**9**9",))}),
    changed("a shape with a lambda", "(lambda: 1)()", values={"y": TensorEntry(dtype="", shape=("(lambda: 1)()",))}),
    changed("a dtype that is a function", "dtype 'load'", inputs=(InputEntry(name="x", dtype="load", shape=()),)),
    changed("an input twice", "an input twice", inputs=manifest().inputs * 2),
    changed("a size twice", "size twice", dims=manifest().dims * 2),
    changed("a size of odd range", "has the invalid range", dims=(DimEntry(name="batch", min=-5, max=3),)),
    changed(
        "a condition that is code",
        "an invalid expression over sizes",
        conditions=("__import__('os').system('touch owned') == 0",),
    ),
    changed("a condition with an exponent", "an invalid expression over sizes", conditions=("9 ** 9 ** 9 == 0",)),
    changed(
        "a condition that is endless",
        "an invalid expression over sizes",
        conditions=("batch" + " + 1" * 5000 + " == 0",),
    ),
    changed(
        "a default that is no constant", "names a missing constant or parameter", defaults={"head.weight": "nowhere"}
    ),
    changed(
        "a default of no parameter", "names a missing constant or parameter", defaults={"nowhere.weight": "constant_0"}
    ),
    changed("limits that are negative", "the limit", limits={"vocab_size": -1}),
    absent("the absence of numbers with fractions", dtype="model"),
    absent("the absence of what has no name", "dtype 'load'", dtype="load"),
    absent("an absence beyond all numbers", absent=2**40),
    absent("a negative absence", absent=-2),
    absent("an absence beyond all memory", shape=("batch", "sequence", 2**40)),
    absent("an absence of many small axes", shape=("batch", "sequence", 64, 64, 64)),
    absent("an absence of endless axes", shape=("batch", "sequence", *[1] * 10000)),
    absent("an absence of an unknown size", shape=("batch", "sequence", "u0")),
    changed("a decoder without padding", "the rule for the decoder", decoder={"start": 1}),
    changed("a decoder with another entry", "the rule for the decoder", decoder={"pad": 0, "end": 1}),
    changed("a decoder that begins before its tokens", "the rule for the decoder", decoder={"pad": 0, "start": -1}),
    changed(
        "a decoder that begins outside of the vocabulary", "but the largest table", decoder={"pad": 0, "start": 100_000}
    ),
    changed("padding outside of the vocabulary", "but the largest table", decoder={"pad": 100_000}),
    absent("an absence outside of all tables", "but the largest table", absent=100_000),
    changed("a decoder that begins beyond all numbers", "the rule for the decoder", decoder={"pad": 2**40}),
    parameter("a parameter of negative shape", "[-2, 2]", shape=(-2, 2)),
    parameter("a parameter beyond all memory", f"[{2**62}, {2**62}]", shape=(2**62, 2**62)),
    parameter("a parameter of an unknown dtype", "unknown dtype", dtype="load"),
    parameter("a parameter without sources", "no sources", sources=()),
    parameter("a parameter that is tied to nothing", "is not another parameter", tied_to="nothing"),
    parameter("a parameter that is tied to itself", "is not another parameter", tied_to="head.weight"),
    parameter("a conversion that does not exist", "which does not exist", conversion=7),
    model("a class outside of transformers", "not a model of transformers", module="os", class_name="PathLike"),
    model(
        "a module of transformers that is no model",
        "not a model of",
        module="transformers.trainer",
        class_name="Trainer",
    ),
    model("a class that is a path", "not a model of transformers", class_name="A.__init__.__globals__['os']"),
    model("a module beyond transformers", "not a model of transformers", module="transformers.models.x.modeling_x.os"),
    model("own code that is not there", "not among the files", module="seqbuild_modeling_0123456789abcdef.evil"),
    model(
        "an attention from the hub",
        "has the unsupported attention implementation",
        attn_implementation="kernels-community/flash-attn",
    ),
    model("a run dtype that is a function", "unknown dtype", dtype="load"),
    model(
        "a pattern of endless size", "is not a supported regular expression", ignored_keys=(r"((a{1000}){1000}){1000}",)
    ),
    model("a pattern of endless length", "is not a supported regular expression", ignored_keys=("a" * 10_001,)),
    model("patterns without end", "more than 4096", ignored_keys=("a",) * 4097),
    model("a pattern that is none", "is not a supported regular expression", ignored_keys=("(",)),
    changed("a library source that is a path", "which is not a module name", sources={"../../etc/passwd": "00"}),
    changed("a foreign leaf of any class", "has the class", foreign={"layers.0": "os:system"}, policy="linear"),
    changed("a foreign leaf that is a path", "has the class", foreign={"layers.0": "torch.nn:../x"}, policy="linear"),
    changed("a policy that is unknown", "the leaf policy is", policy="everything"),
    *(cached(*attack) for attack in CACHED),
    changed(
        "a cached value of keys alone",
        "must have k and v",
        cached=(replace(_cached(), part="k"),),
    ),
    changed(
        "a module that keeps its keys twice",
        "must have k and v",
        cached=(_cached(), replace(_cached(), part="v"), _cached()),
    ),
    changed("a kind of leaf that is unknown", "is not a leaf kind", leaf_kinds=(LeafKind(kind="system"),)),
    changed(
        "a leaf with odd options", "has the invalid options", leaf_kinds=(LeafKind(kind="Linear", options={"x": (1,)}),)
    ),
    changed(
        "a leaf with huge options",
        f"the invalid stride ({2**40},)",
        leaf_kinds=(
            LeafKind(
                kind="Conv1d",
                options={
                    "stride": (2**40,),
                    "padding": (0,),
                    "dilation": (1,),
                    "groups": (1,),
                    "padding_mode": ("zeros",),
                },
            ),
        ),
    ),
    changed("a leaf without a kind", "does not describe", leaves={"layers.0": 3}),
    changed(
        "a leaf with a private name",
        "does not describe",
        leaves={"__class__": 0},
        leaf_kinds=(LeafKind(kind="Linear"),),
    ),
    changed(
        "a conversion of no file",
        "not listed",
        conversions=(ConversionEntry(file="conversions/009.py", num_sources=2),),
    ),
    changed(
        "a conversion elsewhere",
        "config.json, line 1: anything but one function",
        conversions=(ConversionEntry(file="config.json", num_sources=2),),
    ),
]

PLACES = [
    changed(
        f"a file at {path!r}",
        "leaves the directory or is not plain",
        files=(*manifest().files, FileEntry(path=path, bytes=1, sha256=sha256(b"x"))),
    )
    for path in (
        "../outside.txt",
        "/etc/hostname",
        "subgraphs/../../x.txt",
        "a\\b.txt",
        "a\0b.txt",
        "",
        ".",
        "..",
        "./x.txt",
        "a//b.txt",
        ".hidden.txt",
        "manifest.msgpack",
        "\u202etxt.exe.json",
        "a\nb.txt",
        "~/x.txt",
        "x" * 300 + ".txt",
    )
]
LISTED = [
    changed("a file listed twice", "config.json twice", files=(*manifest().files, manifest().files[0])),
    changed(
        "a file of negative size", "config.json is damaged", files=tuple(replace(e, bytes=-1) for e in manifest().files)
    ),
    changed(
        "a file of a huge size", "that are allowed", files=tuple(replace(e, bytes=2**62) for e in manifest().files)
    ),
    changed(
        "a size that lies by one",
        "config.json is damaged",
        files=tuple(replace(e, bytes=e.bytes + 1) for e in manifest().files),
    ),
    changed(
        "a digest in capitals",
        "config.json is damaged",
        files=tuple(replace(e, sha256=e.sha256.upper()) for e in manifest().files),
    ),
    changed(
        "files without end",
        "more than the",
        files=tuple(FileEntry(path=f"a{index}.txt", bytes=0, sha256="") for index in range(20_001)),
    ),
    replaced("a shared library", "unsupported file type", {"evil.so": b"\x7fELF"}),
    replaced("a pickle", "unsupported file type", {"pytorch_model.bin": b"\x80\x04"}),
    replaced("a path file for Python", "unsupported file type", {"evil.pth": b"import os; os.system('touch owned')\n"}),
    replaced("byte code that is listed", "unsupported file type", {"runtime.pyc": b"\xcb\x0d\x0d\x0a"}),
    replaced("code that is no program", "does not list as a program", {"sitecustomize.py": b"import os\n"}),
    replaced("code beside the programs", "does not list as a program", {"subgraphs/typing.py": FIRST.encode()}),
    replaced("own code that is not stated", "and be listed as", {"modeling/modeling_evil.py": b"import os\n"}),
]

CONSTANTS = [
    constants("a header that is longer than the file", "cannot be read", b"{}", length=2**40),
    constants("a header of negative length", "cannot be read", b"{}", length=2**64 - 1),
    constants("a header that is no JSON", "cannot be read", b"{"),
    constants("a header of endless depth", "cannot be read", b"[" * 100_000),
    constants(
        "a tensor beyond the file",
        "unexpected bytes after",
        b'{"constant_0":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}',
    ),
    constants(
        "a shape that lies",
        "do not match its shape",
        b'{"constant_0":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}',
    ),
    constants(
        "a shape that overflows",
        "has the invalid shape",
        b'{"constant_0":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}',
    ),
    constants(
        "a shape that is not a number",
        "has the invalid shape",
        b'{"constant_0":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    ),
    constants(
        "a negative place",
        "do not match its shape",
        b'{"constant_0":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
    ),
    constants(
        "tensors that overlap",
        "do not match its shape",
        b'{"constant_0":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"constant_1":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ),
    constants(
        "a hole between tensors",
        "do not match its shape",
        b'{"constant_0":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    ),
    constants(
        "bytes of no tensor",
        "unexpected bytes after",
        b'{"constant_0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ),
    constants(
        "a tensor twice",
        "has a duplicate key",
        b'{"constant_0":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"constant_0":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
    ),
    constants(
        "an unknown dtype",
        "has the unsupported dtype",
        b'{"constant_0":{"dtype":"OBJECT","shape":[2],"data_offsets":[0,8]}}',
    ),
    constants(
        "other tensors than stated",
        "does not contain the tensors",
        b'{"constant_9":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ),
    Attack(
        "constants that are not stated",
        "does not list",
        lambda root: write(
            root,
            {
                name: files()[name]
                for name in ("config.json", "constants.safetensors", "subgraphs/001.py", "conversions/000.py")
            },
            subgraphs=(replace(manifest().subgraphs[1], input_names=("layers_0",)),),
            inputs=(InputEntry(name="layers_0", dtype="model", shape=("batch", "sequence", 2)),),
            constants=(),
        ),
    ),
]


def config(name: str, reason: str, text: str) -> Attack:
    return replaced(name, reason, {"config.json": text.encode()})


CONFIGS = [
    config("a config that is no JSON", "is not a valid config", "{"),
    config("a config that is a list", "is not a JSON object", "[]"),
    config("a config of endless depth", "config.json is not a valid config", "[" * 100_000 + "]" * 100_000),
    config(
        "a config with an auto_map",
        "does not contain the model's own code",
        '{"auto_map": {"AutoConfig": "evil.Config"}}',
    ),
    config(
        "an auto_map to another repository",
        "does not contain the model's own code",
        '{"auto_map": {"AutoModel": "evil/repo--m.Model"}}',
    ),
    config("a checkpoint for timm", "names a file", '{"model_args": {"checkpoint_path": "vocab.txt"}}'),
    config("weights for timm", "names a file", '{"vision_config": {"model_args": {"pretrained": true}}}'),
    config("an architecture from a directory", "is a path or an address", '{"architecture": "local-dir:/tmp/evil"}'),
    config(
        "a backbone from the hub", "is a path or an address", '{"vision_config": {"backbone": "hf_hub:evil/model"}}'
    ),
    config(
        "a backbone from the hub by its name",
        "is a path or an address",
        '{"vision_config": {"backbone": "evil/model"}}',
    ),
    config("a backbone from a directory", "is a path or an address", '{"backbone": "./evil"}'),
    config(
        "an auto_map of a part",
        "does not contain the model's own code",
        '{"text_config": {"auto_map": {"AutoModel": "evil/repo--m.Model"}}}',
    ),
    config("an auto_map that is text", "does not contain the model's own code", '{"auto_map": "evil/repo--m.Model"}'),
    *(
        config(f"a kernel from the hub: {name}", "names a kernel", text)
        for name, text in (
            ("attention", '{"_attn_implementation": "someone/kernels"}'),
            ("attention's other name", '{"attn_implementation": "someone/kernels@main:fn"}'),
            ("attention by part", '{"attn_implementation": {"text_config": "someone/kernels"}}'),
            ("attention of a part", '{"backbone_config": {"_attn_implementation_internal": "someone/kernels"}}'),
            ("paged attention", '{"_attn_implementation": "paged|someone/kernels"}'),
            ("experts", '{"experts_implementation": "someone/kernels"}'),
            ("experts of a part", '{"text_config": {"_experts_implementation_internal": "someone/kernels"}}'),
        )
    ),
    config("another file", "only the config's class may define", '{"configuration_files": ["config.4.0.0.json"]}'),
    config(
        "other names of entries",
        "only the config's class may define",
        '{"attribute_map": {"a": "_attn_implementation"}}',
    ),
    config("no parts", "only the config's class may define", '{"sub_configs": {}}'),
    config("a dunder", "is not a valid entry", '{"text_config": {"__class__": 1}}'),
    config("layers without end", "num_hidden_layers = 10000000, and no", '{"num_hidden_layers": 10000000}'),
    config("a width without end", "text_config.hidden_size = ", '{"text_config": {"hidden_size": 1000000000000}}'),
    config("a size that is no number", "vocab_size = inf", '{"vocab_size": Infinity}'),
    config("experts without end", "and no model has more", '{"num_layers": 1000, "num_experts": 60000}'),
    config("a number without end", "more than 64 bits", '{"hidden_size": 1' + "0" * 400 + "}"),
]

TOKENIZERS = [
    *(
        replaced(
            f"{name} as the tokenizer",
            "is not the name of a tokenizer class",
            {file: f'{{"tokenizer_class": {name}}}'.encode()},
        )
        for name, file in (
            ('"AutoModel"', "tokenizer_config.json"),
            ('"AutoTokenizer"', "tokenizer_config.json"),
            ('"LlamaForCausalLM"', "tokenizer_config.json"),
            ('"HiggsAudioV2TokenizerModel"', "tokenizer_config.json"),
            ('"pipeline"', "tokenizer_config.json"),
            ('"AutoProcessor"', "config.json"),
            ('["LlamaTokenizer"]', "tokenizer_config.json"),
            ('"../evil.Tokenizer"', "tokenizer_config.json"),
        )
    ),
]

LARGE = [
    parameter("a hundred thousand axes", "has the invalid shape", shape=(2**47,) * 100_000),
    parameter("a hundred thousand negative axes", "has the invalid shape", shape=(-1,) * 100_000),
    absent("an absent number for a hundred thousand axes", shape=("batch", "sequence", *(2**47,) * 100_000)),
    changed(
        "a leaf with a long name", "is of kind 0", leaves={"a." * 500 + "a": 0}, leaf_kinds=(LeafKind(kind="Linear"),)
    ),
]
TABLES = [*LARGE, *ENCODING, *VALUES, *PLACES, *LISTED, *CONSTANTS, *CONFIGS, *TOKENIZERS]
