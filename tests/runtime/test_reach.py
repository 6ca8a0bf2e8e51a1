"""Which functions of a library are found to be harmless, judged by a small library of modules made up for it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.language import library
from runtime.language import opaque as opaque_paths
from runtime.language.library_sources import source_file
from runtime.language.opaque import why_refused

TOY = "transformers.models.toy.modeling_toy"
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Modules that this host's transformers seems to have."""
    files: dict[str, Path] = {}

    def write(text: str, module: str = TOY) -> None:
        files[module] = tmp_path / f"{module}.py"
        files[module].write_text(textwrap.dedent(text))

    monkeypatch.setattr(library, "source_file", lambda name: files.get(name) or source_file(name))
    caches = (library.source, opaque_paths.why_refused, opaque_paths._called_by_forwards)
    for cache in caches:
        cache.cache_clear()
    yield write
    for cache in caches:
        cache.cache_clear()


def body(statements: str, head: str = "import torch\nfrom torch import nn\n") -> str:
    """A class whose forward calls a step of these statements."""
    lines = textwrap.indent(textwrap.dedent(statements).strip(), " " * 8)
    forward = "    def forward(self, x, name=None):\n        return self.step(x, name)\n"
    return f"{head}\nclass Toy(nn.Module):\n{forward}\n    def step(self, x, name=None):\n{lines}\n"


@pytest.mark.parametrize(
    "statements",
    [
        "return torch.nn.functional.relu(x).to(x.dtype)",
        "return [torch.cat([a, x]) for a in x.split(2)]",
        "y = torch.zeros_like(x)\ny[..., 0] = x.sum(-1)\nreturn {'a': y.view(-1)}",
        "return getattr(self, 'other', None)",
    ],
)
def test_what_calculates_is_allowed(statements: str, write: Write) -> None:
    write(body(statements))
    assert why_refused(f"{TOY}:Toy.step") == ""


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        ("return open(name)", "names open"),
        ("f = open\nreturn f(name)", "names open"),
        ("return torch.load(name)", "names torch.load"),
        ("return list(map(torch.load, [name]))", "names torch.load"),
        ("return torch.hub.load(name, name)", "names torch.hub.load"),
        ("return torch.ops.load_library(name)", "names torch.ops.load_library"),
        ("return torch.compile(x)", "names torch.compile"),
        ("import os\nreturn os.system(name)", "imports import os"),
        ("return eval(name)", "names eval"),
        ("return exec(name)", "names exec"),
        ("return __import__(name)", "names __import__"),
        ("return globals()[name](x)", "names globals"),
        ("return getattr(self, name)(x)", "calls getattr with name"),
        ("return getattr(torch, name)(x)", "calls getattr with name"),
        ("return setattr(x, name, x)", "calls setattr with name"),
        ("return x.__reduce__()", "reads __reduce__"),
        ("return self.__dict__[name]", "reads __dict__"),
        ("return x.tofile(name)", "calls the unknown method tofile"),
        ("f = x.tofile\nreturn f(name)", "calls the unknown method tofile"),
        ("return map(x.register_hook, [name])", "reads the method register_hook"),
        ("return self.load_state_dict(name)", "calls the unknown method load_state_dict"),
        ("return self.from_pretrained(name)", "calls the unknown method from_pretrained"),
        ("return self.other.generate(x, name)", "calls the unknown method generate"),
        ("return unknown(x)", "names unknown, which is not defined"),
        ("global STATE\nSTATE = x\nreturn x", "changes the global STATE"),
        ("self.config._attn_implementation = name\nreturn x", "sets _attn_implementation"),
        ("self.config = name\nreturn x", "sets config"),
        ("class A: pass\nreturn A()", "defines a class A"),
        ("return (lambda f: f(name))(open)", "names open"),
        ("def inner(path=open): return path(name)\nreturn inner()", "names open"),
    ],
)
def test_what_does_more_is_refused(statements: str, reason: str, write: Write) -> None:
    write(body(statements))
    assert reason in why_refused(f"{TOY}:Toy.step")


OTHER = "transformers.models.toy.modeling_other"


@pytest.mark.parametrize(
    ("statements", "head", "reason"),
    [
        ("return read(x, name)", f"from {OTHER} import read", f"{OTHER}:read names open"),
        ("return read(x, name)", "from .modeling_other import read", f"{OTHER}:read names open"),
        ("return other.read(x)", f"import {OTHER} as other", f"{OTHER}:read names open"),
        ("return TABLE['a'](x)", "from .modeling_other import TABLE", f"{OTHER}:read names open"),
        ("return Holder(x).value", "from .modeling_other import Holder", f"{OTHER}:Holder.__init__ names open"),
        ("return x.fetch(name)", "from .modeling_other import Holder\nH = Holder", "calls the unknown method fetch"),
        ("y = Holder(x)\nreturn y.fetch(name)", "from .modeling_other import Holder", "names open"),
        ("return cached_file(name)", "from ...utils.hub import cached_file", "transformers.utils.hub:cached_file"),
        ("return AutoModel.from_pretrained(name)", "from ..auto import AutoModel", "transformers.models.auto"),
        ("return get(name)", "from requests import get", "names requests.get"),
        ("return np.fromfile(name)", "import numpy as np", "names numpy.fromfile"),
        ("return np.load(name)", "import numpy as np", "names numpy.load"),
        ("return run(name)", "from subprocess import run", "names subprocess.run"),
        ("return torch.serialization.load(name)", "import torch", "names torch.serialization.load"),
    ],
)
def test_what_is_reached_elsewhere_is_refused(statements: str, head: str, reason: str, write: Write) -> None:
    write(
        """
        def read(x, name=None): return open(name)
        TABLE = {"a": read}
        class Holder:
            def __init__(self, value): self.value = open(value)
            def fetch(self, name): return open(name)
        """,
        OTHER,
    )
    write(body(statements, f"import torch\nfrom torch import nn\n{head}\n"))
    assert reason in why_refused(f"{TOY}:Toy.step")


def test_a_base_class_is_looked_at(write: Write) -> None:
    write(
        """
        class Mixin:
            def fetch(self, name): return open(name)
        """,
        OTHER,
    )
    write(
        """
        from torch import nn
        from .modeling_other import Mixin
        class Toy(nn.Module, Mixin):
            def forward(self, x): return self.step(x)
            def step(self, x): return self.fetch(x)
        """
    )
    assert f"{OTHER}:Mixin.fetch names open" in why_refused(f"{TOY}:Toy.step")


def test_what_a_constructor_hands_over_is_looked_at(write: Write) -> None:
    write(
        """
        from torch import load, nn
        class Toy(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = load
            def forward(self, x): return self.step(x)
            def step(self, x): return self.act(x)
        """
    )
    assert "torch.load" in why_refused(f"{TOY}:Toy.step")


def test_only_what_a_forward_calls_is_allowed(write: Write) -> None:
    write(body("return x") + "\n    def unused(self, x):\n        return x\n")
    assert why_refused(f"{TOY}:Toy.step") == ""
    assert why_refused(f"{TOY}:Toy.forward") == ""
    assert why_refused(f"{TOY}:Toy.unused") == "no forward of the model's code calls it"


@pytest.mark.parametrize(
    "name", ["nn", "nn.Module", "load", "Toy", "Toy.alias", "alias", "Toy.step.inner", "Toy.inherited"]
)
def test_only_what_the_module_defines_is_allowed(name: str, write: Write) -> None:
    text = body(
        "return load(x) and alias(x) and self.alias(x)",
        "from torch import nn\nfrom torch.hub import load\nalias = load\n",
    )
    write(text + "\n    alias = load\n")
    assert why_refused(f"{TOY}:{name}") != ""
