"""What holds for every test: offline libraries, no sockets, one thread per worker, one small tokenizer."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import gc
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

CompileOnce = Callable[..., Path]

collect_ignore = ["bench", "clients"]
# Python's default is to look for cyclic garbage after some hundred allocations; with a million live objects of
# libraries that takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)


_test_modules: dict[str, ModuleType] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Take test modules out of `sys.modules`; `_own_module` puts back those that a test needs."""
    _test_modules.update({item.module.__name__: item.module for item in session.items if hasattr(item, "module")})
    for name in _test_modules:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def _own_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Import a test's own module and those that it takes names from, as if its file ran alone.

    A trace copies the state of every Python module that a model may use; a hundred test modules would make it slow.
    """
    taken = {getattr(value, "__module__", None) for value in vars(request.module).values()}
    own = {name: module for name, module in _test_modules.items() if module is request.module or name in taken}
    sys.modules.update(own)
    yield
    for name in own:
        del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def _no_internet() -> Iterator[None]:
    """Fail a test that opens an internet connection; sockets of the file system stay allowed."""
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}

    def guarded(name: str) -> Any:
        def call(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                self.close()
                _refuse(args[-1])
            return real[name](self, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(socket.socket, name, guarded(name))
        yield


def _refuse(address: object) -> NoReturn:
    # `Failed` is no `Exception`, so code that falls back when the network is down cannot swallow it.
    pytest.fail(f"a test opened an internet connection to {address}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer without merges: `<bos>` is 0, `<eos>` is 1, byte b of the text is 2 + b.

    Texts begin with `<bos>`. The chat template writes `u:hello<eos>` for a user's message.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # Byte-level BPE writes a byte as the character of its number where that is printable, else from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {"<bos>": 0, "<eos>": 1} | {characters[byte]: 2 + byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('unknown role ' + message.role) }}"
        "{% endif %}"
        "{{ message.role[0] }}:{{ message.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    directory = tmp_path_factory.mktemp("byte-tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompileOnce:
    """Compile a config without weights: its name in `tiny_models`, changes of it, and options of `compile_model`.

    A name with a slash is that of a case in `tests.zoo`.

    The same is compiled once in a run: workers share the directory, and the compiler finds what another one has made.
    Tests copy an artifact before they change it.
    """
    from filelock import FileLock

    from runtime.artifact.encoding import sha256
    from seqbuild import compile_model
    from tests import zoo
    from tests.tiny_models import save_config

    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    (root / "models").mkdir(parents=True, exist_ok=True)

    def compile_once(name: str, *, config: Mapping[str, Any] = {}, **options: Any) -> Path:
        source = root / "models" / sha256(repr((name, sorted(config.items()))).encode())[:12] / Path(name).name
        with FileLock(root / "models" / "lock"):
            if not source.exists() and "/" in name:
                zoo.small_config(zoo.case_of(name)).save_pretrained(source)
            elif not source.exists():
                save_config(name, source, **config)
        return compile_model(source, out=root / "artifacts", **options)

    return compile_once
