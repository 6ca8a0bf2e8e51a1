"""Facts of runs that nobody made: names that try to be HTML, and very many modules."""

from __future__ import annotations

import math

from runtime.report.facts import (
    MeasuredSubgraph,
    Perplexity,
    PlannedSubgraph,
    ReportedModule,
    RunFacts,
    checked,
)

SCRIPT = "<script>window.hacked = 1</script>"
HOSTILE_NAMES = (
    f"model.layers.0.{SCRIPT}",
    "model.layers.1.<img src=x onerror='window.hacked = 2'>",
    'model.layers.2."\'><b>q_proj</b><a href="javascript:window.hacked=3">x</a>',
    "model.layers.3.</script><script>window.hacked = 4</script>",
    "model.layers.4.{{ 7 * 7 }}{% raw %}",
    "model.layers.5.%{x}<br><b>bold</b> $\\sqrt{2}$ &lt;i&gt;",
    "model.layers.6.\u202eq_proj\u2028\x00\x1b[31m",
    f"model.layers.7.{'x' * 10_000}",
    f"{'a.' * 3000}q_proj",
    "model.layers.999999999999999999999.q_proj",
    "model.layers.٣.q_proj",
    "",
    "..",
    "__proto__",
    "model.layers.0.mlp.experts.1.<i>gate</i>",
    "model.layers.0.self_attn.q_proj",
)


def hostile_facts() -> RunFacts:
    """A run with such names everywhere, and numbers that are not finite."""
    numbers = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 1e-320, 0.25]
    modules = [
        ReportedModule(
            name=name,
            algorithm=SCRIPT,
            scheme=HOSTILE_NAMES[1],
            error=numbers[place % len(numbers)],
            loss=numbers[(place + 1) % len(numbers)],
            damping=numbers[(place + 2) % len(numbers)],
            num_tokens=2**62 if place % 3 else 0,
            num_dead=place,
            fallback=SCRIPT if place % 2 else "",
            seconds=numbers[(place + 3) % len(numbers)],
        )
        for place, name in enumerate(HOSTILE_NAMES)
    ]
    subgraphs = [
        MeasuredSubgraph(index=place, label=name, seconds=number, peak_host_bytes=2**62, phases={SCRIPT: number})
        for place, (name, number) in enumerate(zip(HOSTILE_NAMES, numbers, strict=False))
    ]
    plan = [
        PlannedSubgraph(index=place, label=SCRIPT, host=2**62, seconds=number) for place, number in enumerate(numbers)
    ]
    facts = RunFacts(
        model=SCRIPT,
        outcome=f"failed: {SCRIPT}",
        command=HOSTILE_NAMES[3],
        recipe=f"{HOSTILE_NAMES[3]}\n" * 50,
        recipe_name=HOSTILE_NAMES[1],
        device=SCRIPT,
        started=math.inf,
        num_subgraphs=2**62,
        bytes_before=2**62,
        bytes_after=1,
        perplexity=Perplexity(before=1e308, after=1e-308, tokens=2**62),
        reason=SCRIPT,
        seconds={SCRIPT: 1e300},
        settings={SCRIPT: SCRIPT, "model": SCRIPT},
        versions={SCRIPT: SCRIPT},
        digests={SCRIPT: SCRIPT * 100},
        warnings=[SCRIPT, "warning: \x1b[2J", *HOSTILE_NAMES],
        modules=modules,
        subgraphs=subgraphs,
        plan=plan,
    )
    return checked(facts, "a test")


def large_facts(num_modules: int) -> RunFacts:
    """A mixture of 64 layers, with as many experts as make this many modules; each expert saw other tokens."""
    modules = []
    for number in range(num_modules):
        layer, rest = number % 64, number // 64
        name = "self_attn.q_proj" if not rest else f"mlp.experts.{rest // 3}.{('gate', 'up', 'down')[rest % 3]}_proj"
        modules.append(
            ReportedModule(
                name=f"model.layers.{layer}.{name}",
                algorithm="gptq",
                scheme="4 bit int weights in groups of 128",
                error=0.01 + 0.0001 * layer + 1e-7 * number,
                loss=1.0 + number,
                damping=0.01,
                num_tokens=(number * 7919) % 30_000,
                num_bytes=4096,
            )
        )
    subgraphs = [
        MeasuredSubgraph(index=place, label=f"model.layers.{place}", seconds=10.0 + place % 5, peak_host_bytes=10**10)
        for place in range(64)
    ]
    return checked(
        RunFacts(model="large", bytes_before=10**12, bytes_after=3 * 10**11, modules=modules, subgraphs=subgraphs),
        "a test",
    )
