"""Options that several commands have, in both command lines."""

from __future__ import annotations

from typing import Annotated

import typer

Skew = Annotated[bool, typer.Option("--allow-version-skew", help="Go on with other sources of transformers.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Execute the code that the model brings.")]
ActivationMemory = Annotated[
    str | None,
    typer.Option(help="For values between subgraphs: 16GiB of host memory, or device=4GiB,host=16GiB; then disk."),
]
StatisticsMemory = Annotated[
    str | None, typer.Option(help="For the statistics of a layer's experts, 8GiB say; by default no bound.")
]
