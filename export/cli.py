"""The command line: one thin function a verb. Nothing heavy is imported before work starts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from pruner import __version__
from pruner.errors import LONGEST_LINE, PruneAttnError, one_line, printable
from pruner.files import expand
from pruner.select import OBJECTIVES, POSITIONAL, STRATEGIES, check_useful

if TYPE_CHECKING:
    from rich.table import Table

    from export.hub import Push

_PATH = click.Path()
_REVISION = click.option("--revision", metavar="REV", help="A Hub id's branch, tag or commit.  [default: main]")
_CACHE = click.option("--cache-dir", type=_PATH, help="Where a Hub id is fetched to.  [default: the Hub's cache]")


def _CHOOSING(command: Callable[..., Any]) -> Callable[..., Any]:  # noqa: N802, used as the options beside it are
    """What ``select`` and ``convert`` have in common."""
    kinds, devices, strategies = (click.Choice(c) for c in (OBJECTIVES, ("cpu", "cuda"), STRATEGIES))
    for name, settings in (
        ("--resume", {"is_flag": True, "help": "Go on from where a stopped run got to, to the same plan."}),
        ("--objective", {"type": kinds, "help": "Divergence from the original, or loss.  [default: kl]"}),
        ("--device", {"type": devices, "default": "cpu", "help": "Where they are run.  [default: cpu]"}),
        ("--seed", {"type": click.IntRange(0), "default": 0, "help": "Where the windows lie.  [default: 0]"}),
        ("--length", {"type": int, "metavar": "N", "help": "Tokens each.  [default: half the context, at most 2048]"}),
        ("--samples", {"type": int, "metavar": "N", "help": "Windows of the text to run.  [default: 64]"}),
        ("--text", {"type": _PATH, "help": "Calibration text (UTF-8) for similarity, search, exhaustive."}),
        ("--strategy", {"type": strategies, "help": "Which go first.  [default: last; search with --text]"}),
    ):  # fmt: skip
        command = click.option(name, **settings)(command)
    return command


_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="prune-attn")
@click.pass_context
def cli(context: click.Context) -> None:
    """Prune attention out of Llama checkpoints: physically, provably, and for every runtime."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.argument("checkpoint", type=_PATH)
@_REVISION
@_CACHE
@_JSON
def inspect(checkpoint: str, as_json: bool, **options: Any) -> None:
    """Show a checkpoint's sublayers and sizes, and what dropping some would save.

    CHECKPOINT is a directory or a Hub id, of which no weights are fetched.
    """
    from pruner.checkpoint.hub import open_source
    from pruner.summary import inspect

    facts = inspect(open_source(checkpoint, **options))
    if not expand(checkpoint).exists():
        facts["path"] = checkpoint  # the Hub id, not the cache
    if as_json:
        _print_json(facts)
        return
    table = _table("", "")
    shards = facts["shards"]
    rows = [
        ("attention sublayers", _sublayers(facts["attention_layers"], facts["numbered_layers"])),
        ("MLP sublayers", _sublayers(facts["mlp_layers"], facts["numbered_layers"])),
        ("heads", "{num_attention_heads} over {num_key_value_heads} key/value, {head_dim} wide".format(**facts)),
        ("hidden, intermediate", "{hidden_size:,}, {intermediate_size:,}".format(**facts)),
        ("vocabulary", f"{facts['vocab_size']:,}" + (", embeddings tied" if facts["tied_embeddings"] else "")),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", _bytes(facts["bytes"])),
        ("dtype", ", ".join(facts["dtypes"])),
        ("shards", f"{len(shards)}" + (f" ({shards[0]['file']})" if len(shards) == 1 else "")),
        ("KV cache a token", _bytes(facts["kv_cache_bytes_per_token"])),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    saved = _table("dropping", "of", "parameters", "weights", "KV cache a token")
    for kind, name in (("attention", "attention"), ("mlp", "MLP"), ("block", "blocks")):
        of = (
            len(facts["attention_layers" if kind == "attention" else "mlp_layers"])
            if kind != "block"
            else facts["layers"]
        )
        for row in _sample(facts["savings"][kind], facts["original_layers"]):
            saved.add_row(
                f"{row['drop']} {name}",
                str(of),
                f"-{row['parameters']:,}",
                f"-{_bytes(row['bytes'])}",
                f"-{_bytes(row['kv_cache_bytes_per_token'])}" if row["kv_cache_bytes_per_token"] else "0",
            )
    _print(str(facts["path"]), table, saved)


@cli.command()
@click.argument("source", type=_PATH)
@click.argument("output", type=_PATH)
@click.option("--drop", metavar="N|P%", help="How many sublayers: a count, or a percentage of the original's.")
@click.option("--layers", metavar="A-B,C", help="Drop these layers, numbered from 0 as they are in SOURCE.")
@click.option("--plan", type=_PATH, help="Drop what a saved plan says (ours, EvoPress's or LLM-Drop's).")
@click.option(
    "--sublayer", type=click.Choice(["attention", "mlp", "block"]), help="What to drop.  [default: attention]"
)
@_CHOOSING
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Convert the weights.  [default: as they are]",
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest weights file.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT where prune-attn wrote it.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the result; write nothing.")
@click.option("--allow-first-layer", is_flag=True, help="Let layer 0's attention go (vLLM will not load it).")
@click.option("--allow-all", is_flag=True, help="Let every attention, or every MLP, go.")
@click.option(
    "--validate", "then_validate", is_flag=True, help="Measure OUTPUT against SOURCE afterwards (briefly on a CPU)."
)
@click.option("--validation-text", type=_PATH, help="What to measure on, where --text is what to choose by.")
@click.option("--onnx/--no-onnx", default=True, help="Write model.onnx and genai_config.json too.  [default: do]")
@_REVISION
@_CACHE
@click.option("--push", metavar="OWNER/NAME", help="Then push OUTPUT to this Hub repository.")
@_JSON
def convert(
    source: str, output: str, as_json: bool, then_validate: bool, validation_text: str | None, **options: Any
) -> None:
    """Write SOURCE, a directory or a Hub id, to OUTPUT with sublayers physically removed."""
    from export.convert import convert

    if then_validate:
        if as_json or options["dry_run"]:
            raise PruneAttnError(
                "--validate goes with neither --json nor --dry-run; run prune-attn validate afterwards"
            )
        chosen_by_text = options["strategy"] not in (None, *POSITIONAL)
        if not chosen_by_text and validation_text is None:  # what is measured on must not be what was chosen by
            validation_text, options["text"] = options["text"], None
        if validation_text is not None:
            from pruner.text import read_utf8

            read_utf8(validation_text)  # known before hours of work
    elif validation_text is not None:
        raise PruneAttnError("--validation-text goes with --validate; add it, or leave both out")
    check_useful(options, _given)
    kept = None if options["dry_run"] else options["text"]
    with _choosing(kept) as (choosing, say), _progress("writing") as progress:
        result = convert(source, output, progress=progress, choosing=choosing, say=say, **options)
    if as_json:
        _print_json(result.to_json())
        return
    before, after = result.before, result.after
    table = _table("", "before", "after", "")
    for label, key, show in (
        ("attention sublayers", "attention_sublayers", str),
        ("MLP sublayers", "mlp_sublayers", str),
        ("parameters", "parameters", "{:,}".format),
        ("weights", "bytes", _bytes),
        ("KV cache a token", "kv_cache_bytes_per_token", _bytes),
    ):
        change = f"{100 * (after[key] / before[key] - 1):+.1f}%" if after[key] != before[key] else ""
        table.add_row(label, show(before[key]), show(after[key]), change)
    quoted_source, quoted_output = shlex.quote(source), shlex.quote(output)
    dropped = [
        f"{name} at {', '.join(map(str, layers))}"
        for name, layers in (("attention", result.plan.attention), ("MLP", result.plan.mlp))
        if layers
    ]
    verb = "would drop" if result.dry_run else "dropped"
    following = (
        "nothing was written; run it without --dry-run"
        if result.dry_run
        else f"next: prune-attn verify {quoted_output} --against {quoted_source}"
        + (f" --revision {shlex.quote(options['revision'])}" if options["revision"] else "")
        + (f" --cache-dir {shlex.quote(options['cache_dir'])}" if options["cache_dir"] else "")
    )
    _print(f"{verb} {'; '.join(dropped)}", table, *(f"note: {note}" for note in result.notes), following)
    for pushed in result.pushed:
        _print_push(pushed)
    if then_validate:
        from export.validate import brief

        _validate(str(result.source), output, False, {"text": validation_text, **brief()})


@cli.command()
@click.argument("source", type=_PATH)
@click.option(
    "--drop", metavar="N|P%", required=True, help="How many sublayers: a count, or a percentage of the original's."
)
@click.option("--sublayer", type=click.Choice(["attention", "mlp", "block"]), default="attention", show_default=True)
@_CHOOSING
@click.option("-o", "--output", type=_PATH, default="plan.json", show_default=True, help="Where the plan goes.")
@click.option("--overwrite", is_flag=True, help="Replace the plan that lies there.")
@click.option("--allow-first-layer", is_flag=True, help="Let layer 0's attention go (vLLM will not load it).")
@click.option("--allow-all", is_flag=True, help="Let every attention, or every MLP, go.")
@_REVISION
@_CACHE
@_JSON
def select(source: str, output: str, as_json: bool, **options: Any) -> None:
    """Choose what to drop; save the plan, which serves every fraction (convert --plan PLAN --drop 25%)."""
    from export.select import select

    check_useful(options, _given)
    with _choosing(options["text"]) as (progress, say):
        result = select(source, output, progress=progress, say=say, **options)
    if as_json:
        _print_json(result.to_json())
        return
    plan, facts = result.plan, result.plan.selection or {}
    count = len({*plan.attention, *plan.mlp})
    measure = facts.get("objective", "")
    columns = [name for name in (measure, "perplexity") if facts and (name == measure or "perplexity" in facts)]
    table = _table("", "layer", *columns)
    for i, layer in enumerate(plan.order):
        shown = [f"{facts['scores'][i]:.4f}"] if columns else []
        shown += [f"{facts['perplexity'][i]:.2f}"] if "perplexity" in facts else []
        table.add_row(f"{i + 1}{' <' if i + 1 == count else ''}", str(layer), *shown)
    lines = [f"{plan.sublayer} by {plan.strategy}, in the order in which they go; the first {count} (<) are asked for"]
    if "perplexity" in facts:
        lines[0] += (
            f"; {measure} and perplexity with all up to there dropped (none: {facts['original_perplexity']:.2f})"
        )
    after = [
        f"of {n}, better than the first {n}: {', '.join(map(str, layers))}" for n, layers in (plan.sets or {}).items()
    ]
    if result.cost:
        after.append(
            "{seconds:.1f} s, {layer_evaluations:,.0f} layer evaluations, {tokens_per_second:,.0f} tokens/s".format(
                **result.cost
            )
        )
    where = shlex.quote(str(result.path))
    after.append(f"next: prune-attn convert {shlex.quote(source)} OUTPUT --plan {where}")
    _print(*lines, table, *after)


@cli.command()
@click.argument("output", type=_PATH)
@click.option("--against", type=_PATH, metavar="SOURCE", help="Compare every kept tensor with SOURCE, byte for byte.")
@click.option("--revision", metavar="REV", help="SOURCE's branch, tag or commit, on the Hub.  [default: main]")
@click.option("--output-revision", metavar="REV", help="OUTPUT's, where it is on the Hub.  [default: main]")
@_CACHE
@_JSON
def verify(output: str, against: str | None, as_json: bool, **options: Any) -> None:
    """Check a directory that convert wrote. Exits with 1 where something is wrong.

    OUTPUT and SOURCE are directories or Hub ids.
    """
    from export.verify import verify

    with _progress("comparing") as progress:
        result = verify(output, against, progress=progress, **options)
    if as_json:
        _print_json(result.to_json())
    elif result.ok:
        after = f" converted to {result.converted_to}" if result.converted_to else ""
        compared = f"; {result.compared} tensors equal {against}'s{after}, byte for byte" if against else ""
        _say(f"{output}: ok{compared}")
    else:
        for problem in result.problems:
            _say(problem, err=True)
    if not result.ok:
        sys.exit(1)


def _given(name: str) -> bool:
    """Whether the option stood on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _takes_only(option: str, *names: str) -> None:
    """Refuse whatever else was given to this command."""
    for parameter in click.get_current_context().command.params:
        if parameter.name not in names and _given(parameter.name):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise PruneAttnError(f"{option} has no use for {name}; leave it out")


@cli.command()
@click.argument("directory", type=_PATH)
@click.argument("output", type=_PATH, required=False)
@click.option(
    "--last-token-logits/--all-logits",
    default=None,
    help="Logits of each row's last token only, or of all.  [default: as model.onnx has it, else all]",
)
@click.option("--context", type=int, metavar="N", help="Tokens.  [default: as model.onnx has it, else the model's own]")
@click.option("--accept-changes", is_flag=True, help="Shards were changed since the last export, and that was meant.")
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Convert the weights; only into an OUTPUT."
)
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest weights file there.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT where prune-attn wrote it; replace FILE.")
@click.option("--gguf", type=_PATH, metavar="FILE", help="Write a GGUF file for llama.cpp, and nothing else.")
@_REVISION
@_CACHE
@_JSON
def export(directory: str, output: str | None, as_json: bool, gguf: str | None, **options: Any) -> None:
    """Write model.onnx and genai_config.json: in place, or for any Llama into OUTPUT."""
    if gguf is not None:
        from export.gguf import write_gguf

        _takes_only("--gguf FILE", "directory", "gguf", "overwrite", "as_json")
        with _progress("writing") as progress:
            written = write_gguf(directory, gguf, overwrite=options["overwrite"], progress=progress)
        if as_json:
            _print_json(written)
        else:
            _say(f"{gguf}: {_bytes(written['bytes'])}; next: llama-completion -m {shlex.quote(gguf)}")
        return
    from export.deliver import export

    if output is None and _given("max_shard_size"):
        raise PruneAttnError("--max-shard-size belongs to an export into an OUTPUT; name one, or leave it out")
    with _progress("writing") as progress:
        result = export(directory, output, progress=progress, **options)
    if as_json:
        _print_json(result.to_json())
        return
    from pruner.text import has_tokenizer

    where = shlex.quote(str(result.path))
    following = f'prune-attn generate {where} --prompt "Once upon a time"'
    if not has_tokenizer(result.path):
        following = f"copy the original's tokenizer files into {where}; nothing generates text without them"
    packed = "" if result.packed == result.attention else f", {result.attention - result.packed} with q, k, v apart"
    _print(
        f"{result.path}: model.onnx ({_bytes(result.graph_bytes)} over the .safetensors bytes) and "
        f"genai_config.json, {result.attention} attentions{packed}, context {result.context}",
        *(f"note: {note}" for note in result.notes),
        f"next: {following}",
    )


@cli.command()
@click.argument("directory", type=_PATH)
@click.option("--prompt", required=True, help="What to go on from.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="How many at most.")
@click.option("--backend", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@_REVISION
@_CACHE
@_JSON
def generate(directory: str, as_json: bool, revision: str | None, cache_dir: str | None, **options: Any) -> None:
    """Go on from a prompt, greedily, and say how long it took."""
    from export.generate import generate
    from pruner.checkpoint.hub import fetch

    with _progress("fetching") as progress:  # closed before text comes
        runtime = options["backend"] == "onnx"
        directory = str(fetch(directory, revision=revision, cache_dir=cache_dir, runtime=runtime, progress=progress))
    result = generate(directory, write=None if as_json else _write_text, **options)
    if as_json:
        _print_json(vars(result))
        return
    click.echo()
    speed = f", {result.tokens_per_second:.1f} tokens/s" if result.tokens_per_second else ""
    click.echo(
        f"{result.backend} on {result.device}: prefill of {result.prompt_tokens} tokens {result.prefill_ms:.1f} ms"
        f"{speed} ({len(result.tokens)} new)",
        err=True,
    )


@cli.command()
@click.argument("source", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Folder for the table, the plots and the plans.")
@click.option("--text", type=_PATH, required=True, help="Test text, UTF-8: what perplexity is measured on.")
@click.option("--calibration", type=_PATH, help="Another text, by which similarity, search and exhaustive choose.")
@click.option("--sublayer", default="attention", show_default=True, metavar="A,B", help="Of attention, mlp, block.")
@click.option("--fractions", default="10%,25%,33%,50%", show_default=True, metavar="P%,N", help="How many go.")
@click.option(
    "--strategy",
    metavar="A,B",
    help="Of last, keep-last, similarity, search, exhaustive.  [default: the first four; two without --calibration]",
)
@click.option("--window", type=click.IntRange(2), help="Tokens a test window.  [default: the context, at most 2048]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N test windows.  [default: all]")
@click.option("--samples", type=click.IntRange(1), help="Calibration samples.  [default: as select has it]")
@click.option("--length", type=click.IntRange(2), help="Tokens a calibration sample.  [default: as select has it]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of calibration samples and search.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Compute in this.  [default: the checkpoint's on CUDA, float32 on the CPU]",
)
@click.option(
    "--rounds", type=click.IntRange(0), default=10, show_default=True, help="Times that speed is measured; 0: not."
)
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that sweep wrote.")
@_JSON
def sweep(source: str, output: str, as_json: bool, **options: Any) -> None:
    """Measure what each fraction of each sublayer costs and gains: a table and two plots.

    Interrupted, it keeps what is finished in OUTPUT.partial; the same command goes on from there.
    """
    from export.sweep import sweep

    try:
        with _steps() as progress:
            result = sweep(source, output, progress=progress, **options)
    except _Stopped:
        _say(f"what is finished is kept in {output.rstrip('/')}.partial; the same command goes on", err=True)
        raise
    if as_json:
        _print_json(result.to_json())
        return
    table = _table("dropped", "by", "perplexity", "", "decode", "prefill")
    for row in (result.original, *result.points):
        what = f"{row['dropped']} of {row['of']} {row['sublayer']}" if row["sublayer"] else "nothing"
        cost = [f"{row['perplexity']:,.2f}", f"x{row['perplexity_ratio']:.2f}"] if row["perplexity"] else ["-", ""]
        speed = [f"x{row[s]:.2f}" if row[s] else "-" for s in ("decode_speedup", "prefill_speedup")]
        table.add_row(what, row["strategy"], *cost, *speed)
    _print(table, f"{result.path}: sweep.md, sweep.csv, sweep.json, the plots, and plans for convert --plan")


@cli.command()
@click.argument("output", type=_PATH)
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, or to refs/pr/N.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the main branch.")
@click.option("--commit-message", metavar="TEXT", help="What the commit says.")
@click.option("--dry-run", is_flag=True, help="List what would be pushed; ask nobody, send nothing.")
@_JSON
def push(output: str, repository: str, as_json: bool, **options: Any) -> None:
    """Push OUTPUT, which convert wrote, to REPOSITORY (owner/name) on the Hub."""
    from export.hub import push

    result = push(output, repository, show_progress=sys.stderr.isatty(), **options)
    if as_json:
        _print_json(result.to_json())
    else:
        _print_push(result)


def _print_push(result: Push) -> None:
    if result.dry_run:
        table = _table("would push", "size")
        for name, size in result.files.items():
            table.add_row(name, _bytes(size))
        table.add_row(f"{len(result.files)} files", _bytes(sum(result.files.values())))
        _print(table)
    for note in result.notes:
        _print(f"note: {note}")
    for name in result.removed:
        _print(f"note: {name}, of an earlier push, was removed there")
    if not result.dry_run:
        _print(f"pushed: {result.pull_request or result.url}")


_OF_PART = {
    "accuracy": ("text", "window", "stride", "bos", "max_tokens"),
    "tasks": ("tasks", "limit"),
    "latency": ("batch", "prompt", "new_tokens", "repeats", "seconds", "compiled"),
}


@cli.command()
@click.argument("original", type=_PATH)
@click.argument("pruned", type=_PATH)
@click.option("--text", type=_PATH, help="UTF-8 text that neither model has seen. Without it no accuracy is measured.")
@click.option("-o", "--output", type=_PATH, help="Where the report goes.  [default: PRUNED/report]")
@click.option("--backend", metavar="B,B", help="torch, onnx.  [default: both, where PRUNED has a model.onnx]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", help="What PyTorch computes in.  [default: float32 on the CPU, as stored on CUDA]")
@click.option("--only", metavar="P,P", help="same-function, accuracy, tasks, latency.  [default: all]")
@click.option("--tasks", metavar="T,T", help="openllm, any task of lm-evaluation-harness, or a task's YAML file.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most N examples of each task.")
@click.option(
    "--window", type=click.IntRange(2), metavar="N", help="Tokens of context.  [default: the model's, at most 4096]"
)
@click.option("--stride", type=click.IntRange(1), metavar="N", help="Tokens between windows.  [default: half a window]")
@click.option(
    "--bos",
    type=click.Choice(["once", "every", "none"]),
    default="once",
    show_default=True,
    help="BOS before the text, before every window, or not at all.",
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Take only the text's first N tokens.")
@click.option("--batch", metavar="N,N", default="1,8", show_default=True, help="Rows that are timed together.")
@click.option("--prompt", metavar="N,N", help="Prompt lengths that are timed.  [default: 128,512,2048, what fits]")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Timed after each prompt.")
@click.option("--repeats", type=click.IntRange(3), default=20, show_default=True, help="Times that each model is run.")
@click.option("--seconds", type=float, default=60, show_default=True, help="After that long, 3 repeats are enough.")
@click.option("--compiled/--no-compiled", default=None, help="Time transformers compiled too.  [default: on CUDA]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same accuracy.")
@click.option("--work", type=_PATH, metavar="DIR", help="Place for temporary graphs and weights.  [default: OUTPUT]")
@click.option("--max-perplexity-increase", metavar="P%", help="Limit: exit with 3 where it is broken.")
@click.option("--min-agreement", metavar="X", help="Limit: share of tokens with the same most likely one.")
@click.option("--min-task-average-ratio", metavar="X", help="Limit: pruned over original.")
@click.option("--min-decode-speedup", metavar="X", help="Limit: of each backend, over all batches and prompts.")
@_JSON
def validate(original: str, pruned: str, as_json: bool, **options: Any) -> None:
    """Measure PRUNED against ORIGINAL and write a report. Exits with 3 where a limit is broken.

    A run that was stopped goes on where it was when it is started again. Exits with 1 where PRUNED is not ORIGINAL
    without those sublayers.
    """
    only = options["only"]
    for part, names in _OF_PART.items():
        measured = part in only if only is not None else part == "latency" or options[names[0]]
        for name in () if measured else filter(_given, names):
            raise PruneAttnError(f"--{name.replace('_', '-')} is for {part}, which is not asked for; leave it out")
    _validate(original, pruned, as_json, options)


def _validate(original: str, pruned: str, as_json: bool, options: dict[str, Any]) -> None:
    from export.validate import validate

    with _steps() as progress:
        done = validate(original, pruned, progress=progress, **options)
    if as_json:
        _print_json(done.results)
    elif done.exit_code != 1:
        from export.report.content import glance_rows

        table = _table("", "original", "pruned", "change")
        for column in table.columns:
            column.no_wrap = False
        table.columns[1].no_wrap = True
        for row in glance_rows(done.results):
            table.add_row(*row)
        notes = (f"note: {note}" for note in done.results["notes"])
        _print(table, "in brackets: 95% intervals", *notes, f"the report lies in {done.output}/report.html")
    for problem in done.problems:
        _say(problem, err=True)
    if done.exit_code:
        sys.exit(done.exit_code)


@cli.command()
@click.argument("results", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=_PATH, required=True, help="Where the files go.")
def report(results: tuple[str, ...], output: str) -> None:
    """Render a results.json again, or several side by side."""
    from export.report.write import report

    for path in report(results, output):
        _say(str(path))


# -- output ------------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _say(text: str, err: bool = False) -> None:
    """One line; whatever it quotes of others' files can neither move the cursor nor fill the screen."""
    click.echo(printable(text, LONGEST_LINE), err=err)


def _write_text(text: str) -> None:
    """What a model says: as it is, but to a terminal without control characters."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" or c >= "\xa0" else repr(c)[1:-1] for c in text)
    click.echo(text, nl=False)


def _print(*parts: str | Table) -> None:
    import shutil

    from rich.console import Console

    # rendered first, so that a broken pipe is ours to handle; a narrow window wraps lines but keeps the numbers
    width = max(80, shutil.get_terminal_size().columns)
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True, width=width)
    with console.capture() as text:
        for part in parts:
            console.print(printable(part, LONGEST_LINE) if isinstance(part, str) else part)
    click.echo(text.get(), nl=False)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    class Printable(Table):
        def add_row(self, *cells: str) -> None:  # type: ignore[override]
            super().add_row(*(printable(cell, 100) for cell in cells))

    table = Printable(box=box.SIMPLE, show_header=any(columns), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _bytes(n: int) -> str:
    value = float(n)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _sublayers(kept: list[int], numbered: int) -> str:
    gone = sorted(set(range(numbered)) - set(kept))
    return f"{len(kept)} of {numbered}" + (f", none at {', '.join(map(str, gone))}" if gone else "")


def _sample(rows: list[dict[str, int]], original: int) -> list[dict[str, int]]:
    """What ``convert`` takes for --drop 1, 10%, 25%, 33% and 50%, as far as there is so much left."""
    from pruner.plan import parse_drop

    counts = {parse_drop(share, original) for share in ("1", "10%", "25%", "33%", "50%")}
    return [row for row in rows if row["drop"] in counts]


@contextmanager
def _progress(verb: str) -> Iterator[Callable[..., None] | None]:
    """A progress bar on a terminal's standard error; nothing in a pipe. A third argument is what is done instead."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None, visible=False)  # until there is something to show

        def show(done: int, total: int, what: str = verb) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)

        yield show


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each part of a long job on a terminal's standard error; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                for old in tasks.values():
                    bar.remove_task(old)
                tasks.clear()
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield update


@contextmanager
def _choosing(
    text: str | None,
) -> Iterator[tuple[Callable[[float, float, str], None] | None, Callable[[str], None] | None]]:
    """Progress of a selection, and lines about it, on a terminal's standard error; nothing in a pipe."""
    try:
        with _choosing_shown() if sys.stderr.isatty() else nullcontext((None, None)) as shown:
            yield shown
    except _Stopped as stop:
        if text is not None:
            stop.hint += "; steps that were finished are kept: --resume goes on from there"
        raise


@contextmanager
def _choosing_shown() -> Iterator[tuple[Callable[[float, float, str], None], Callable[[str], None]]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("choosing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("choosing", total=None, status="")

    def progress(done: float, total: float, status: str) -> None:
        if not bar.finished:
            bar.start()
        bar.update(task, completed=done, total=total, status=status)
        if done >= total:
            bar.stop()

    try:
        yield progress, lambda line: console.print(printable(line, LONGEST_LINE), markup=False)
    finally:
        bar.stop()


# -- entry -------------------------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """A signal asked the process to end; unwinding removes what was half written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.hint = signum, "nothing half written is left"


def _stop(signum: int, frame: object) -> NoReturn:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # the first one is enough, and nothing may cut the cleaning short
    raise _Stopped(signum)


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main() -> NoReturn:
    """The console script: every failure is one line on standard error, and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as the process lives
    try:
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
                signal.signal(signum, _stop)
        code = cli.main(prog_name="prune-attn", standalone_mode=False)
        sys.stdout.flush()
        code, text = code if isinstance(code, int) else 0, ""
    except SystemExit as error:
        code, text = error.code, ""
    except (Exception, _Stopped) as error:
        if os.environ.get("PRUNE_ATTN_DEBUG") == "1":
            raise
        code, text = _explain(error)
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # all is done; an interrupt now would only print a traceback
    if text:
        _say(f"prune-attn: {text}", err=True)
    if isinstance(code, int) and code > 128 and threading.active_count() > 1:  # transfers, whose end nobody waits for
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for what went wrong."""
    if isinstance(error, PruneAttnError):
        return error.exit_code, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "prune-attn"
        return 2, f"{' '.join(error.format_message().split())} (see `{where} --help`)"
    if isinstance(error, _Stopped):
        return 128 + error.signum, f"stopped by {signal.Signals(error.signum).name}; {error.hint}"
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, "the reader of the output went away"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return 1, f"{name}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return 1, "out of memory"
    return (
        1,
        f"unexpected {type(error).__name__}: {one_line(error, 300)} (PRUNE_ATTN_DEBUG=1 shows where)",
    )


if __name__ == "__main__":
    main()
