"""The commands of `flaxqwen` and their options; what they do is in the modules beside this one, imported on call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import flaxqwen
from flaxqwen.cli.options import (
    AdapterName,
    AsJson,
    AudioFiles,
    Distributed,
    Dtype,
    MaxNewTokens,
    MeshSizes,
    ModelName,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    given,
)

app = typer.Typer(
    name="flaxqwen",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Qwen2, Qwen2.5 and Qwen2-Audio in JAX/Flax: convert checkpoints, generate text, train, compare with PyTorch.",
    epilog="MODEL is a folder, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or demo, which is in the package. "
    "`flaxqwen COMMAND --help` has the options of a command, and examples. What is compiled is kept in "
    "~/.cache/flaxqwen/compiled, 2 GB at most; JAX_COMPILATION_CACHE_DIR names another folder, and "
    "JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.",
)


def _examples(*lines: str) -> str:
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b: keep the lines as they are


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flaxqwen {flaxqwen.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    "convert",
    epilog=_examples(
        "flaxqwen convert Qwen/Qwen2.5-0.5B-Instruct qwen-flax",
        "flaxqwen convert qwen-flax qwen-pytorch --to pytorch --max-shard-size 2GB",
        "flaxqwen convert qwen-pytorch qwen-linen --layout linen --format msgpack --dtype float32",
        "flaxqwen convert Qwen/Qwen2.5-7B-Instruct qwen-int8 --quantize int8",
        "flaxqwen convert Qwen/Qwen2.5-72B-Instruct qwen-orbax --to orbax",
        "flaxqwen convert --check qwen-flax",
    ),
)
def _convert(
    context: typer.Context,
    src: Annotated[str, typer.Argument(metavar="SRC", help="A folder or a file of any format, or a hub id.")],
    dst: Annotated[
        Path | None, typer.Argument(metavar="DST", help="A folder, which is made.", show_default=False)
    ] = None,
    to: Annotated[
        Literal["flax", "pytorch", "orbax"], typer.Option(help="Whose names and files; orbax restores onto any mesh.")
    ] = "flax",
    format: Annotated[Literal["safetensors", "msgpack"], typer.Option(help="Of Flax's files.")] = "safetensors",
    layout: Annotated[
        Literal["checkpoint", "linen"],
        typer.Option(help="checkpoint: weights [out, in], as PyTorch; linen: kernel, embedding, scale, [in, out]."),
    ] = "checkpoint",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Cast to; default: as stored.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a file, such as 200MB; default: 5GB.")
    ] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Weights to int8 by output channel, or int4 in groups; --dtype brings them back."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint in DST.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check names, shapes and options; write nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Convert nothing: read SRC whole, and compare with its checksums.json.")
    ] = False,
) -> None:
    """Convert a checkpoint between PyTorch, Flax and orbax.

    Weights keep their values byte for byte (but for --dtype and --quantize); config and tokenizer go with them. A
    checkpoint that does not fit its config.json is refused. Files appear when all are complete; if the process is
    killed, the same command goes on.
    """
    from flaxqwen.cli.convert import check_model, convert_model

    if check:
        if dst is not None:
            raise typer.BadParameter("takes one folder", param_hint="--check")
        if others := [option for option in given(context) if option not in ("--src", "--check")]:
            raise ValueError(f"--check converts nothing: drop {', '.join(others)}")
        check_model(src)
        return
    if dst is None:
        raise typer.BadParameter("say where to", param_hint="DST")
    convert_model(
        src,
        dst,
        to=to,
        format=format,
        layout=layout,
        dtype=dtype,
        max_shard_size=max_shard_size,
        quantize=quantize,
        force=force,
        dry_run=dry_run,
    )


@app.command(
    "generate",
    epilog=_examples(
        'flaxqwen generate demo "What is 123 + 456?"',
        'flaxqwen generate Qwen/Qwen2.5-0.5B "The capital of France is"',
        'flaxqwen generate ./qwen "Write a haiku." --chat --temperature 0.7 --top-p 0.8 --seed 1',
        "cat question.txt | flaxqwen generate ./qwen - --chat --json",
        'flaxqwen generate ./qwen --ids "785 6722 315"',
        'flaxqwen generate ./qwen "Is water wet?" --chat --regex "Yes|No"',
        'flaxqwen generate Qwen/Qwen2-Audio-7B-Instruct "What is said?" --audio speech.wav --chat',
    ),
)
def _generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Text; - reads it from stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read the prompt from a file.",
        ),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="IDS", help='A prompt of token ids, "1 2 3": needs no tokenizer.')
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="The prompt is a user's message: apply the template. Default for demo."),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    regex: Annotated[
        str | None, typer.Option(metavar="REGEX", help="All new text matches this regular expression.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The new text is JSON of the schema in this file.")
    ] = None,
    assistant: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model with the same tokenizer, to draft tokens.")
    ] = None,
    adapter: AdapterName = None,
    audio: AudioFiles = None,
    dtype: Dtype = "auto",
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text when it is complete.")] = False,
    mesh: MeshSizes = None,
    distributed: Distributed = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, or answer it (--chat).

    Prints the new text alone, on a terminal as it comes. Of a file or stdin, one newline at the end is no part of the
    prompt. Without --temperature, --top-p or --top-k the model's generation_config.json decides whether to sample.
    """
    from flaxqwen.cli.generate import generate_text, sampling_options
    from flaxqwen.distributed import joined

    with joined(distributed):
        generate_text(
            model,
            prompt,
            file=file,
            ids=ids,
            chat=chat,
            system=system,
            max_new_tokens=max_new_tokens,
            options=sampling_options(temperature, top_p, top_k, repetition_penalty, seed),
            regex=regex,
            json_schema=json_schema,
            assistant=assistant,
            adapter=adapter,
            audio=audio,
            dtype=dtype,
            stream=sys.stdout.isatty() and not no_stream,
            as_json=as_json,
            mesh=mesh,
            distributed=distributed,
        )


@app.command(
    "batch",
    epilog=_examples(
        "flaxqwen batch Qwen/Qwen2.5-0.5B-Instruct questions.jsonl answers.jsonl --max-new-tokens 512",
        "flaxqwen batch ./qwen in.jsonl out.jsonl --batch-size 64 --temperature 0.7 --seed 1 --json",
    ),
)
def _batch(
    model: ModelName,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="A JSON object a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Appears when all is done, in IN's order.")],
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows that run together.")] = 16,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of lines without one.")] = 0,
    adapter: AdapterName = None,
    dtype: Dtype = "auto",
    mesh: MeshSizes = None,
    distributed: Distributed = False,
    as_json: AsJson = False,
) -> None:
    """Continue many prompts, or answer many chats, from a file into a file.

    A line of IN is {"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]} or {"ids": [...]}, and
    may have "id", which is given back, and "options" of generate() for it alone. Rows that end are replaced, so that
    the batch stays full; a text does not depend on the others. After a kill the same command goes on. Malformed lines
    go to OUT.jsonl.errors. Of several processes (--distributed) each takes its part, and all see the same files.
    """
    from flaxqwen.cli.batch import run_batch
    from flaxqwen.cli.generate import sampling_options
    from flaxqwen.distributed import joined

    with joined(distributed):
        run_batch(
            model,
            source,
            target,
            rows=batch_size,
            max_new_tokens=max_new_tokens,
            options=sampling_options(temperature, top_p, top_k, repetition_penalty, None),
            seed=seed,
            adapter=adapter,
            dtype=dtype,
            mesh=mesh,
            distributed=distributed,
            as_json=as_json,
        )


@app.command(
    "chat",
    epilog=_examples(
        "flaxqwen chat Qwen/Qwen2.5-0.5B-Instruct",
        'flaxqwen chat ./qwen --system "Answer in French." --temperature 0.7',
    ),
)
def _chat(
    model: ModelName,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    adapter: AdapterName = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model in the terminal.

    Each turn runs only its new tokens: the KV cache of the earlier ones is kept.
    /help lists what can be typed beside messages. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    from flaxqwen.cli.chat import chat
    from flaxqwen.cli.generate import sampling_options

    chat(
        model,
        system=system,
        max_new_tokens=max_new_tokens,
        options=sampling_options(temperature, top_p, top_k, repetition_penalty, seed),
        adapter=adapter,
        dtype=dtype,
    )


@app.command(
    "info",
    epilog=_examples(
        "flaxqwen info Qwen/Qwen2.5-7B-Instruct",
        "flaxqwen info Qwen/Qwen2.5-72B-Instruct --mesh fsdp=2,tensor=8",
        "flaxqwen info ./qwen --json",
    ),
)
def _info(
    model: ModelName,
    mesh: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Of data, fsdp and tensor: show what each device holds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's architecture, size and memory.

    From its config alone: weights are neither downloaded nor read.
    """
    from flaxqwen.cli.info import show_info

    show_info(model, mesh=mesh, as_json=as_json)


@app.command(
    "compile",
    epilog=_examples(
        "flaxqwen compile Qwen/Qwen2.5-7B-Instruct --topology v6e:2x2 --mesh tensor=1 --context 8192",
        "flaxqwen compile Qwen/Qwen2.5-72B-Instruct --topology v5p:2x2x2 --batch 8 --context 8192 --json",
        "flaxqwen compile Qwen/Qwen2.5-7B --topology v6e:2x4 --train --batch 8 --context 2048",
    ),
)
def _compile(
    model: ModelName,
    topology: Annotated[str, typer.Option(metavar="CHIP:SIZES", help="Such as v5e:4x4, v5p:2x2x2, v6e:2x2.")],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Of data, fsdp and tensor; default: tensor, or fsdp in training, takes all. Fewer chips do, too.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Rows.")] = 1,
    context: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a row, and of its KV cache.")] = 8192,
    train: Annotated[bool, typer.Option("--train", help="A step of training in place of generation.")] = False,
    lora: Annotated[
        str | None, typer.Option(metavar="FIELDS", help="With --train: of an adapter, as of train.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile generation, or training, for TPUs, on any machine.

    The real compiler (pip install 'flaxqwen[tpu]') says what each chip needs, whether it fits, and what is sent from
    chip to chip; the step times are rooflines. Of the model, config.json alone is read.
    """
    from flaxqwen.cli.compile import show_compiled, show_training

    where: dict[str, Any] = {"topology": topology, "mesh": mesh, "batch": batch, "context": context, "as_json": as_json}
    if train:
        show_training(model, lora=lora, **where)
    elif lora is not None:
        raise ValueError("--lora is of training: give --train, too")
    else:
        show_compiled(model, **where)


@app.command(
    "parity",
    epilog=_examples(
        "flaxqwen parity Qwen/Qwen2.5-0.5B-Instruct",
        'flaxqwen parity ./qwen --dtype bfloat16 --prompt "Hello" --prompt "1 + 1 =" --report report',
    ),
)
def _parity(
    model: ModelName,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and arithmetic.")] = "float32",
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="May be given several times; default: four built-in ones.")
    ] = None,
    audio: AudioFiles = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Greedy tokens to compare.")] = 32,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and parity.png there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare with PyTorch, module by module.

    Runs Transformers' model and ours on the same prompts. Exits 1 where a tolerance does not hold.
    """
    from flaxqwen.cli.parity import show_parity

    files, texts = audio or [], prompt or None
    if not show_parity(model, dtype=dtype, prompts=texts, audio=files, steps=steps, report=report, as_json=as_json):
        raise typer.Exit(1)


@app.command(
    "train",
    epilog=_examples(
        "flaxqwen train Qwen/Qwen2.5-0.5B chats.jsonl --out tuned --epochs 3 --learning-rate 1e-5",
        "flaxqwen train ./qwen texts.jsonl --out tuned --eval held_out.jsonl --plot",
        "flaxqwen train ./qwen chats.jsonl --out tuned --resume",
        "flaxqwen train ./qwen chats.jsonl --out adapter --lora r=16,lora_alpha=32,target_modules=q_proj,v_proj",
    ),
)
def _train(
    model: ModelName,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSON lines of messages, or of texts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For the model, checkpoints and metrics.")],
    evaluate: Annotated[Path | None, typer.Option("--eval", metavar="FILE", help="Held-out data, as DATA.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="Default: what --epochs take.")] = None,
    epochs: Annotated[float, typer.Option(metavar="N", min=0, help="How often each example is seen.")] = 1.0,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Packed rows of a micro-batch.")] = 8,
    accumulate: Annotated[int, typer.Option(metavar="N", min=1, help="Micro-batches of a step.")] = 1,
    length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens of a packed row; default: 1024, within the context.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(metavar="LR", min=0, help="The highest.")] = 1e-5,
    final_learning_rate: Annotated[float, typer.Option(metavar="LR", min=0, help="Where its cosine ends.")] = 0.0,
    warmup_steps: Annotated[int, typer.Option(metavar="N", min=0, help="Until the highest.")] = 0,
    optim: Annotated[
        Literal["adamw", "muon"], typer.Option(help="muon: of the matrices of layers; adamw takes the rest.")
    ] = "adamw",
    weight_decay: Annotated[float, typer.Option(metavar="W", min=0, help="Of matrices.")] = 0.0,
    beta2: Annotated[float, typer.Option(metavar="B", min=0, max=1, help="Of AdamW.")] = 0.999,
    max_grad_norm: Annotated[
        float, typer.Option(metavar="G", min=0, help="Clip gradients to this norm; 0: do not.")
    ] = 1.0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the arithmetic; weights are kept in float32. auto: as the model's config says."),
    ] = "auto",
    remat: Annotated[
        Literal["none", "dots", "full"], typer.Option(help="What the backward pass computes again, to save memory.")
    ] = "none",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the order of the data, and of an adapter.")] = 0,
    save_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between checkpoints.")] = 500,
    eval_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between evaluations.")] = 500,
    log_every: Annotated[int, typer.Option(metavar="N", min=1, help="Steps between lines of metrics.jsonl.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR, bit for bit.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Write DIR/loss.png.")] = False,
    lora: Annotated[
        str | None, typer.Option(metavar="FIELDS", help="Train an adapter alone: r=16,lora_alpha=32,... as peft's.")
    ] = None,
    mesh: MeshSizes = None,
    distributed: Distributed = False,
) -> None:
    """Train a model on chats or texts.

    A line of DATA is {"messages": [{"role": "user", "content": "..."}, ...]}, whose loss is on the assistant's messages
    alone, or {"text": "..."}. Examples are packed into rows, where none sees another. SIGTERM saves and stops.
    DIR has the model in PyTorch's format at the end, or the adapter in peft's (--lora), and metrics.jsonl; of several
    processes (--distributed), the model as an orbax checkpoint, of which each writes its part.
    """
    from flaxqwen.cli.train import train_model
    from flaxqwen.distributed import joined

    options = {
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "final_learning_rate": final_learning_rate,
        "warmup_steps": warmup_steps,
        "optim": optim,
        "weight_decay": weight_decay,
        "beta2": beta2,
        "max_grad_norm": max_grad_norm,
        "dtype": dtype,
        "remat": remat,
        "seed": seed,
        "save_every": save_every,
        "eval_every": eval_every,
        "log_every": log_every,
    }
    with joined(distributed):
        train_model(
            model,
            data,
            out,
            evaluate=evaluate,
            length=length,
            resume=resume,
            plot=plot,
            lora=lora,
            options=options,
            mesh=mesh,
            distributed=distributed,
        )
