"""Models that remember a table which they have calculated, each in another place. All take `x` [batch, length, 4]."""

from __future__ import annotations

import collections
import contextvars
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from tests.seqbuild.toys import WIDTH, Layer


def calculate(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A table as rotary embeddings have one."""
    return torch.arange(WIDTH, dtype=torch.float32).div(WIDTH).cos().to(dtype)


unbounded = functools.cache(calculate)
bounded = functools.lru_cache(maxsize=8)(calculate)


@functools.cache
def pair(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"cos": calculate(dtype), "sin": calculate(dtype)}


TABLES: dict[Any, torch.Tensor] = {}
NESTED: dict[str, dict[Any, Any]] = {"rotary": {}}
ORDERED: collections.OrderedDict[Any, torch.Tensor] = collections.OrderedDict()
DEFAULT: collections.defaultdict[Any, list[torch.Tensor]] = collections.defaultdict(list)
LIST: list[torch.Tensor] = []
DEQUE: collections.deque[torch.Tensor] = collections.deque(maxlen=2)
WEAK: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()
LOCAL = threading.local()
CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("table", default=None)
ELSEWHERE = types.ModuleType("another_library_of_tables")
ELSEWHERE.__dict__.update(tables={}, ready=False)
sys.modules[ELSEWHERE.__name__] = ELSEWHERE
is_ready, table = False, None


class Slots:
    __slots__ = ("table",)


class Holder:
    """A helper object that notes that it is ready apart from what it holds."""

    shared: torch.Tensor | None = None

    def __init__(self) -> None:
        self.is_ready = False
        self.table: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if not self.is_ready:
            self.table, self.is_ready = calculate(), True
        assert self.table is not None
        return self.table

    @functools.cached_property
    def once(self) -> torch.Tensor:
        return calculate()

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def method(self, width: int) -> torch.Tensor:
        return calculate() * width

    @classmethod
    def of_class(cls) -> torch.Tensor:
        if cls.shared is None:
            cls.shared = calculate()
        return cls.shared


HOLDER = Holder()


def by_key(tables: Any, key: Any = "table") -> torch.Tensor:
    if key not in tables:
        tables[key] = calculate()
    found: torch.Tensor = tables[key]
    return found


def by_attribute(owner: Any, name: str = "table") -> torch.Tensor:
    if getattr(owner, name, None) is None:
        setattr(owner, name, calculate())
    found: torch.Tensor = getattr(owner, name)
    return found


def appended(tables: Any) -> torch.Tensor:
    if not tables:
        tables.append(calculate())
    found: torch.Tensor = tables[0]
    return found


def of_default(tables: dict[str, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
    return by_key(tables)


def of_keyword(*, tables: dict[str, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
    return by_key(tables)


def of_function() -> torch.Tensor:
    return by_attribute(of_function)


def of_globals() -> torch.Tensor:
    global is_ready, table
    if not is_ready:
        table, is_ready = calculate(), True
    assert table is not None
    return table


def closure() -> Callable[[], torch.Tensor]:
    known = None

    def get() -> torch.Tensor:
        nonlocal known
        if known is None:
            known = calculate()
        return known

    return get


of_closure = closure()


def of_pair() -> torch.Tensor:
    if "table" not in NESTED["rotary"]:
        NESTED["rotary"]["table"] = {"cos": calculate(), "holder": Holder()}
    found: torch.Tensor = NESTED["rotary"]["table"]["cos"] + NESTED["rotary"]["table"]["holder"].get()
    return found


def of_context() -> torch.Tensor:
    if CONTEXT.get() is None:
        CONTEXT.set(calculate())
    found: torch.Tensor = CONTEXT.get()
    return found


def elsewhere() -> torch.Tensor:
    if not ELSEWHERE.ready:
        ELSEWHERE.tables["table"] = calculate()
        ELSEWHERE.ready = True
    found: torch.Tensor = ELSEWHERE.tables["table"]
    return found


def of_weak(module: nn.Module) -> torch.Tensor:
    if module not in WEAK:
        WEAK[module] = calculate()
    return WEAK[module]


# What a module does to get the table, by where it is kept.
PLACES: dict[str, Callable[[Any], torch.Tensor]] = {
    "cache": lambda owner: unbounded(),
    "lru_cache": lambda owner: bounded(torch.float32),
    "cache of a dictionary": lambda owner: pair(torch.float32)["cos"],
    "cache of a method": lambda owner: owner.holder.method(WIDTH),
    "cache in a closure": lambda owner: owner.cached(),
    "dictionary of a module": lambda owner: by_key(TABLES),
    "nested dictionaries": lambda owner: of_pair(),
    "ordered dictionary": lambda owner: by_key(ORDERED),
    "default dictionary": lambda owner: appended(DEFAULT["table"]),
    "list of a module": lambda owner: appended(LIST),
    "deque": lambda owner: appended(DEQUE),
    "weak dictionary": of_weak,
    "local of a thread": lambda owner: by_attribute(LOCAL),
    "context": lambda owner: of_context(),
    "globals": lambda owner: of_globals(),
    "another library": lambda owner: elsewhere(),
    "object of a module": lambda owner: HOLDER.get(),
    "cached property": lambda owner: HOLDER.once,
    "class": lambda owner: by_attribute(type(owner), "of_the_class"),
    "dictionary of a class": lambda owner: by_key(owner.tables),
    "class of a helper": lambda owner: Holder.of_class(),
    "default argument": lambda owner: of_default(),
    "default of a keyword": lambda owner: of_keyword(),
    "function": lambda owner: of_function(),
    "closure": lambda owner: of_closure(),
    "partial": lambda owner: owner.partial(),
    "helper object": lambda owner: owner.holder.get(),
    "slots": lambda owner: by_attribute(owner.slots),
    "dictionary in self": lambda owner: by_key(owner.own),
    "list in self": lambda owner: appended(owner.lists["own"]),
    "attribute": lambda owner: by_attribute(owner, "remembered"),
    "attribute of another module": lambda owner: by_attribute(owner.linear, "remembered"),
    "attribute of a parameter": lambda owner: by_attribute(owner.linear.weight, "remembered"),
    "config": lambda owner: by_attribute(owner.settings),
}


class Remembering(Layer):
    """A layer that adds tables."""

    tables: ClassVar[dict[Any, torch.Tensor]] = {}

    def __init__(self, places: tuple[str, ...]) -> None:
        super().__init__()
        self.places = places
        self.holder, self.slots, self.settings = Holder(), Slots(), types.SimpleNamespace(table=None)
        self.own: dict[Any, torch.Tensor] = {}
        self.lists: dict[str, list[torch.Tensor]] = {"own": []}
        self.partial = functools.partial(by_key, {})

        @functools.cache
        def cached() -> torch.Tensor:
            return calculate()

        self.cached = cached

    def table(self, place: str) -> torch.Tensor:
        return PLACES[place](self)

    def forward(self, x: torch.Tensor, scale: Any = 1) -> torch.Tensor:
        x = super().forward(x, scale)
        for place in self.places:
            x = x + self.table(place)
        return x


class Model(nn.Module):
    """Two layers that remember.

    Args:
        places: some of `PLACES`.
        is_glue: whether the code around the layers uses the tables as well.
    """

    def __init__(self, places: tuple[str, ...], *, is_glue: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Remembering(places), Remembering(places)])
        self.glue = Remembering(places)
        self.is_glue = is_glue

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_glue:
            for place in self.glue.places:
                x = x * (1 + self.glue.table(place))
        for layer in self.layers:
            x = layer(x)
        return x


class Deciding(Remembering):
    """A layer that must be run on real values to be recorded."""

    def forward(self, x: torch.Tensor, scale: Any = 1) -> torch.Tensor:
        x = super().forward(x, scale)
        return x[x.sum(-1) > float(x.mean())].sum(0) + x


class DecidingModel(Model):
    """In the middle of the other layers is one that branches on data."""

    def __init__(self, places: tuple[str, ...]) -> None:
        super().__init__(places)
        self.layers.insert(1, Deciding(places))
