"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, or demo.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of weights and arithmetic; auto: as the model's config says."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message, in place of the template's own.")]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", metavar="ADAPTER", help="A LoRA adapter of peft's: a folder, or a hub id.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Default: that of the model's generation_config, else 256 (chat: 1024)."),
]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", min=0, help="Sample with this temperature; 0 is greedy decoding.")
]
TopP = Annotated[
    float | None, typer.Option(metavar="P", min=0, max=1, help="Sample from the likeliest tokens of this mass.")
]
TopK = Annotated[
    int | None, typer.Option(metavar="K", min=0, help="Sample from the K likeliest tokens; 0 is no limit.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="R", help="Divides the logits of tokens seen before; 1 is none.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of sampling: one seed, one text.")]
MeshSizes = Annotated[
    str | None, typer.Option("--mesh", metavar="SIZES", help="Of data, fsdp and tensor, such as tensor=4.")
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="One of several processes with the same arguments, as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID say, or the cluster.",
    ),
]
AudioFiles = Annotated[
    list[Path] | None,
    typer.Option("--audio", metavar="FILE", help="A wav, flac, ... that the prompt is about; may be given again."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]


def given(context: typer.Context) -> list[str]:
    """What is on the command line, by its name."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return [f"--{name.replace('_', '-')}" for name, source in sources if source and source.name == "COMMANDLINE"]
