"""Damage checkpoints, plans, graphs, companions, cards and results at random, and hold what prune-attn does with them.

Each case takes a sound directory, damages one file of it and runs a few commands, each in a process of its own with
bounds on memory and time. Held: exit codes 0 and 2 only (verify 0 and 1, report 0 and 2), one printable line of error,
no "unexpected" and no "report this", the source as it was, an output whole or absent, and what was converted verifies.

``python scripts/fuzz.py --seed 3 --minutes 10``; what fails is printed with its seed, which ``--only`` runs again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process whose threads have computed would wait for them for ever

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from prune_attn import Layers, WriteOptions  # noqa: E402

SHIPPED = ROOT / "tests" / "data" / "gutenberg-llama-5m"
SECONDS, MEMORY = 20, 1 << 30  # a command's bounds; memory beyond what is mapped when it begins

# -- damage ------------------------------------------------------------------------------------------------------------

RAW = (  # JSON as it is written, for what Python's dump cannot say
    "null", "true", "-1", "0", "1", "3", "1.5", "9223372036854775808", "1" + "0" * 400, "9" * 5000, "1e999", "-1e-999",
    "NaN", "Infinity", '""', '"x"', '"\\ud800"', '"[/x]"', '"\\u001b]0;x\\u0007\\u202e"', '"float16"', '"no"', "[]",
    "{}", "[[]]", '[1, "x"]', '{"x": {}}', '"' + "y" * 1_000_000 + '"', "[" * 100_000 + "]" * 100_000,
    "[" * 90 + "]" * 90, '"../../etc/passwd"', "[" + "1," * 200_000 + "1]", '{"a": 1, "a": 2}', "'x'", "",
)  # fmt: skip
YAML = (
    '!!bool "x"', '!!timestamp "x"', "!!python/object:os.system x", "[en, no]", "no", "0x10", "2020-01-01", ".nan",
    "&a [*a]", "[" * 5_000, "{a: [b", '"\\ud800"', "'[/x]'", "|\n  a\n b", "&a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
    '"\\e]0;x\\a"', "1" * 5000, "\t", "<script>", "null",
)  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """A few random changes to the first ``within`` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        size = min(len(out), within or len(out))
        at, span = rng.randrange(size + 1), rng.choice((1, 1, 2, 4, 8, 100, 5000))
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + span] = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * len(out[at : at + span])
        elif kind == 1:
            out[at : at + span] = rng.randbytes(len(out[at : at + span]))
        elif kind == 2:
            del out[at : at + span]
        elif kind == 3:
            out[at:at] = rng.choice((rng.randbytes(span), b"\x1b[2J", b"[" * span, b"\xed\xa0\x80", b"9" * span))
        elif kind == 4:
            out[at:at] = out[at : at + span]
        else:
            del out[at:]
    return bytes(out)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """One or two values, or a name, of a JSON text become something else."""
    if rng.random() < 0.15:
        return damage_bytes(data, rng)
    value = json.loads(data)
    marks: dict[str, str] = {}
    for i in range(rng.choice((1, 1, 2))):
        inner, key = _place(value, rng)
        if key is None:
            continue
        mark = f"@@{i}@@"
        if rng.random() < 0.1:
            del inner[key]
        elif rng.random() < 0.1 and isinstance(inner, dict):
            inner[rng.choice(("\x1b[2J", "x" * 600, "", "[/x]", mark))] = inner.pop(key)
            marks[mark] = '"\\udfff"'
        elif rng.random() < 0.15:
            inner[key] = rng.choice((_any(value, rng), [inner[key]] * 3, {"x": inner[key]}))
        else:
            inner[key], marks[mark] = mark, rng.choice(RAW)
    text = json.dumps(value)
    for mark, raw in marks.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def _place(value: Any, rng: random.Random) -> tuple[Any, Any]:
    inner, key = None, None
    while isinstance(value, dict | list) and value and (key is None or rng.random() < 0.7):
        inner, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = inner[key]
    return inner, key


def _any(value: Any, rng: random.Random) -> Any:
    inner, key = _place(value, rng)
    return None if key is None else json.loads(json.dumps(inner[key]))


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, whose length is right more often than not."""
    if rng.random() < 0.2:
        return damage_bytes(data, rng, 64)
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], rng)
    stated = len(header) if rng.random() < 0.9 else rng.choice((0, 1, length, 2**63, 2**64 - 1))
    return struct.pack("<Q", stated) + header + data[8 + length :]


def damage_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle in a PyTorch zip with instructions changed, or the zip's own directory."""
    if not data.startswith(b"PK"):
        return _damage_program(data, rng)
    if rng.random() < 0.4:
        at = data.rfind(b"PK\1\2", 0, rng.randrange(len(data) // 2, len(data)))
        return data[:at] + damage_bytes(data[at:], rng) if at > 0 else damage_bytes(data, rng)
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(
                entry.filename, _damage_program(content, rng) if entry.filename.endswith("data.pkl") else content
            )
    return out.getvalue()


def _damage_program(data: bytes, rng: random.Random) -> bytes:
    try:
        starts = [at for _, _, at in pickletools.genops(data)]
    except ValueError:
        return damage_bytes(data, rng, 4000)
    at = rng.choice(starts)
    end = next((start for start in starts if start > at), len(data))
    what = rng.choice((
        b"", data[at:end] * 2, b"(", b"]", b"}", b"N", b"0", b"R", b"\x85", b"h\0", b"cos\nsystem\n", b"]" * 70_000,
        b"\x8a\xff" + b"\x7f" * 255, b"cposix\nsystem\nX\4\0\0\0trueR", b"q\0", b"h\0" * 40_000,
        data[rng.choice(starts) :][:40], b"X\xff\xff\xff\xff", b"\x86R", b"u", b"e", b"Q", b".",
        b"\x8b\xff\xff\xff\xff",
    ))  # fmt: skip
    return data[:at] + what + (data[end:] if rng.random() < 0.5 else data[at:])


def damage_card(data: bytes, rng: random.Random) -> bytes:
    """Another value in the YAML, or other bytes."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    key = rng.choice(("license", "language", "tags", "base_model", "license_name", "license_link", "x"))
    return f"---\n{key}: {rng.choice(YAML)}\n{rng.choice(('---', '', '...'))}\n".encode() + data


def damage_graph(data: bytes, rng: random.Random) -> bytes:
    """Other metadata, constants or attributes in a graph, or other bytes."""
    import onnx

    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    model = onnx.load_model_from_string(data)
    kind = rng.randrange(4)
    if kind == 0:
        prop = rng.choice(model.metadata_props)
        prop.value = rng.choice((damage_json(prop.value.encode(), rng).decode("utf-8", "replace"), rng.choice(RAW)))
    elif kind == 1:
        tensor = rng.choice(model.graph.initializer)
        tensor.dims[:] = rng.choice(([], [0], [2**40], [-1], [1, 1]))
        tensor.raw_data = damage_bytes(tensor.raw_data, rng)
    elif kind == 2:
        node = rng.choice(model.graph.node)
        node.attribute.add(name=rng.choice(("epsilon", "num_heads", "x")), type=rng.choice((1, 2, 3, 4, 6, 14)))
    else:
        del model.graph.node[rng.randrange(len(model.graph.node)) :]
    return model.SerializeToString()


def replace_by_other(path: Path, rng: random.Random) -> None:
    """What is no such file: a FIFO, a device, a link, a folder, a pointer, an empty or an endless file."""
    path.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/tty", "/dev/stdin")))
    elif kind == 2:
        path.symlink_to(rng.choice((path.name, "nowhere", "/etc/passwd", "..", "/")))
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    elif kind == 5:
        path.write_bytes(b"")
    elif kind == 6:
        with open(path, "wb") as file:
            file.truncate(rng.choice((1 << 26, 1 << 31, 1 << 36)))
    else:
        path.write_bytes(rng.choice((b"]", b"}", b"\0", b" ", b"[", b"{}\n", b"\n")) * (1 << 20))


def odd_name(directory: Path, rng: random.Random) -> None:
    """A companion whose name is none that people give."""
    name = rng.choice((
        b"LICENSE\xff\xfe", b"license" + b"x" * 240, b"LICENSE\n", b"license\x1b]0;x\x07", b"NOTICE [x]",
        b"tokenizer\xed",
        b"license.py", b"tokenizer_config.json ", "license\u202etxt".encode(), b"chat_template.jinja", b"LICENSE`|<b>",
    ))  # fmt: skip
    Path(os.fsdecode(os.fsencode(directory) + b"/" + name)).write_bytes(rng.choice((b"x", b"", b"\xff", b"{{")))


# -- what is damaged ---------------------------------------------------------------------------------------------------


def make_sources(where: Path) -> dict[str, Path]:
    """Sound directories by kind: safetensors (one file, shards), PyTorch's (zip, before), Meta's, and a pruned one."""
    import numpy as np
    from foreign import write_bin, write_meta
    from safetensors.numpy import save_file

    from prune_attn import convert
    from pruner.checkpoint.config import read_decoder

    one = where / "one"
    shutil.copytree(SHIPPED, one)
    config = json.loads((one / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
               "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
    (one / "config.json").write_text(json.dumps(config))
    (one / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Model\n")
    noise = np.random.default_rng(0)
    shapes = read_decoder(config, one / "config.json").tensors()
    save_file(
        {name: noise.standard_normal(s).astype("float16") for name, s in shapes.items()}, one / "model.safetensors"
    )
    sharded = where / "sharded"
    convert(one, where / "pruned", Layers("2"), options=WriteOptions(max_shard_size="400KB"))
    shutil.copytree(one, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: noise.standard_normal(s).astype("float16") for name, s in shapes.items()}
    names = list(tensors)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::3]}, sharded / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 3] for i, name in enumerate(names)}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    write_bin(one, where / "zip", shards=2)
    write_bin(one, where / "legacy", legacy=True)
    write_meta(one, where / "meta", parts=2)
    return {path.name: path for path in sorted(where.iterdir())}


def damage(path: Path, rng: random.Random) -> None:
    """Damage one file by what it is."""
    data, suffix = path.read_bytes(), path.suffix
    by_kind: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": damage_json, ".safetensors": damage_header, ".bin": damage_pickle, ".pth": damage_pickle,
        ".onnx": damage_graph, ".md": damage_card,
    }  # fmt: skip
    if rng.random() < 0.12:
        replace_by_other(path, rng)
    elif path.name == "tokenizer.json":  # long, and nobody reads it
        path.write_bytes(damage_bytes(data, rng))
    else:
        path.write_bytes(by_kind.get(suffix, damage_bytes)(data, rng))


# -- cases -------------------------------------------------------------------------------------------------------------


def plans(rng: random.Random) -> bytes:
    """A damaged plan: ours, EvoPress's or LLM-Drop's."""
    ours = {
        "format": "prune-attn plan", "version": 1, "sublayer": "attention", "strategy": "search", "requested": "2",
        "order": [2, 3, 1], "attention": [2, 3], "mlp": [], "source": None, "sets": {"2": [2, 3]}, "selection": {},
    }  # fmt: skip
    llm_drop = {"drop_attn_list": [1, 2], "drop_mlp_list": [], "num_hidden_layers": 4}
    if rng.random() < 0.2:
        return damage_bytes(b"none\nattn\nattn+mlp\nnone\n", rng)
    return damage_json(json.dumps(rng.choice((ours, llm_drop))).encode(), rng)


class Case:
    """One damaged directory and what is done with it. ``problems`` are what must not be."""

    def __init__(self, seed: str, sources: dict[str, Path], where: Path) -> None:
        self.rng, self.where, self.problems = random.Random(seed), where, []
        self.kind = self.rng.choice((*sources, *sources, "plan"))
        self.source, self.out = where / "source", where / "out"
        shutil.copytree(sources["one" if self.kind == "plan" else self.kind], self.source, symlinks=True)

    def run(self) -> None:
        """Damage, run, look."""
        source, out = self.source, self.out
        if self.kind == "plan":
            plan = self.where / "plan.json"
            plan.write_bytes(plans(self.rng))
            self.command("convert", source, out, "--plan", plan)
            return
        if self.rng.random() < 0.06:
            self.what = "odd name"
            odd_name(source, self.rng)
        else:
            path = self.rng.choice(sorted(path for path in source.rglob("*") if path.is_file()))
            self.what = path.name
            damage(path, self.rng)
        if self.kind == "pruned":
            self.command("verify", source)
            self.command("push", source, "o/n", "--dry-run")
        if self.rng.random() < 0.3:
            self.command("inspect", source, *self.rng.choice(((), ("--json",))))
        self.command(
            "convert", source, out, "--layers", "1", *self.rng.choice(((), ("--json",), ("--dtype", "float32")))
        )
        if self.rng.random() < 0.15:
            self.command("export", source, out)
        if self.kind == "pruned":
            self.command("export", source, *self.rng.choice(((), ("--accept-changes",))), changes=True)

    def command(self, verb: str, *args: object, changes: bool = False) -> None:
        """Run one; hold what is promised of it."""
        before = None if changes else facts(self.source)
        code, text = fork([verb, *map(str, args)])
        shown = f"{self.kind}, {getattr(self, 'what', 'plan')}: {verb}: exit {code}: {text[-600:]}"
        if code not in ((0, 1) if verb == "verify" else (0, 2)):
            self.problems.append(shown)
        if any(word in text for word in ("unexpected", "report this", "Traceback")):
            self.problems.append(f"says what it must not; {shown}")
        if not all(line.isprintable() and len(line) <= 2100 for line in text.split("\n")):
            self.problems.append(f"unprintable; {shown!a}")
        if before is not None and facts(self.source) != before:
            self.problems.append(f"source changed; {shown}")
        beside = {path.name for path in self.where.iterdir()} - {"source", "plan.json", "out"}
        if beside or (code != 0 and self.out.exists() and verb != "verify"):
            self.problems.append(f"something is left ({beside or 'out'}); {shown}")
        if code == 0 and self.out.exists() and args[1:2] == (self.out,):
            self.verify(shown)
            shutil.rmtree(self.out)

    def verify(self, shown: str) -> None:
        """What was written with exit 0 is sound."""
        code, text = fork(["verify", str(self.out), "--against", str(self.source)])
        if code != 0:
            self.problems.append(f"does not verify ({code}, {text[-300:]}); {shown}")


def facts(directory: Path) -> list[tuple[Any, ...]]:
    """What changes when somebody touches a directory, but for its files' access times."""
    found = []
    for path in sorted(directory.rglob("*")):
        stat = path.lstat()
        found.append((os.fsencode(path), stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def fork(args: list[str]) -> tuple[int, str]:
    """The command in a child of this process, which has imported all: exit code (-9: too long) and what it said."""
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _be_the_command(args, said.fileno())
        end = time.monotonic() + SECONDS
        while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                done = os.waitpid(pid, 0)
                break
            time.sleep(0.003)
        said.seek(0)
        return os.waitstatus_to_exitcode(done[1]), said.read().decode("utf-8", "backslashreplace")


def _be_the_command(args: list[str], said: int) -> NoReturn:
    from export.cli.main import main

    code = 70
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
        sys.argv = ["prune-attn", *args]
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    """Run cases until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first case's; each has its own, SEED-NUMBER")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--cases", type=int, default=10**9, help="stop after so many, too")
    parser.add_argument("--only", metavar="SEED-NUMBER", help="run this case again")
    given = parser.parse_args()
    import export.gguf
    import export.onnx.staleness
    import export.verify  # noqa: F401, so that children need not

    number = failed = 0
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        sources = make_sources(Path(scratch, "sources"))
        while number < given.cases and time.monotonic() < end:
            seed = given.only or f"{given.seed}-{number}"
            where = Path(scratch, "case")
            where.mkdir()
            case = Case(seed, sources, where)
            case.run()
            for problem in case.problems:
                print(f"{seed}: {problem}", flush=True)
            failed += bool(case.problems)
            number += 1
            shutil.rmtree(where)
            if given.only:
                break
    print(f"{number} cases from seed {given.seed}, {failed} with something wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
