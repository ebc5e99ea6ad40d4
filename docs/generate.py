"""Generates the reference tables of the documentation from the code: `python -m docs.generate`.

A page marks the place of a table with `<!-- generated: NAME -->` and `<!-- end of NAME -->`; the text between these two
lines is replaced. `tests/test_docs.py` fails if a table is not what this module generates.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from pydantic import BaseModel

import savant_ray
from savant_ray import api, config, errors, events
from savant_ray.cli import INTERRUPTED
from savant_ray.commands import COMMANDS
from savant_ray.config import (
    Config,
    FilterConfig,
    HeldOutConfig,
    ProfileConfig,
    SourceConfig,
    all_settings,
    section_descriptions,
)
from savant_ray.settings.yaml_text import show
from tests.tracked_files import tracked_files

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- generated: ([\w ]+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)
HELP_COLUMNS = "100"


def pages() -> list[Path]:
    """Return the README and all pages of the documentation."""
    return tracked_files("README.md", "docs/*.md")


def regenerated(text: str) -> str:
    """Return a page's text with the current content in each generated part.

    Raises:
        KeyError: a part has a name that is not in `PARTS`.
    """
    return PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]().strip()}\n\n{match[4]}", text)


def main() -> None:
    """Rewrite the pages whose generated parts are out of date, and print their names."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (current := regenerated(text)) != text:
            page.write_text(current, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} is updated")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *(map(escaped, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def escaped(cell: str) -> str:
    """Return a cell whose pipes do not end it and whose `<` does not begin an HTML tag."""
    parts = re.split(r"(`[^`]*`)", cell.replace("|", r"\|"))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


# Settings


def settings() -> str:
    """Return a section with a table for each group of settings, and one for the entries of `data.sources`."""
    schemas = Config.model_json_schema()["$defs"]
    parts = []
    for section, group in groupby(all_settings(), lambda row: row.name.partition(".")[0]):
        properties = schemas[type(getattr(Config(), section)).__name__]["properties"]
        rows = [
            (
                f"`{row.name}`",
                f"`{one_line(row.default)}`",
                values(properties[row.name.partition(".")[2]]),
                row.description,
            )
            for row in group
        ]
        heading = f"## {section}\n\n{section_descriptions()[section]}\n\n"
        parts.append(heading + table(("setting", "default", "values", "meaning"), rows))
        if section == "data":
            parts.append(fields("Each entry of `data.sources`", SourceConfig, schemas))
            parts.append(fields("The fields of `filter` of a source", FilterConfig, schemas))
            parts.append(fields("The fields of `data.validation` in its long form", HeldOutConfig, schemas))
        if section == "training":
            parts.append(fields("The fields of `training.profile`", ProfileConfig, schemas))
    return "\n".join(parts)


def fields(title: str, model: type[BaseModel], schemas: dict[str, Any]) -> str:
    """Return a table of the fields of a model that is part of a setting."""
    properties = schemas[model.__name__]["properties"]
    rows = [
        (
            f"`{name}`",
            "required" if field.is_required() else default_of(field.default),
            values(properties[name]),
            field.description or "",
        )
        for name, field in model.model_fields.items()
    ]
    return f"{title}:\n\n" + table(("field", "default", "values", "meaning"), rows)


def default_of(value: Any) -> str:
    """Return the default of a field; a section has none of its own."""
    return "" if isinstance(value, BaseModel) else f"`{show(value)}`"


def one_line(value: Any) -> str:
    """Return a value as it is written in YAML, shortened to one line."""
    return show(value).replace("\n", " ")


def values(schema: dict[str, Any]) -> str:
    """Return what a setting may be, in words, from its JSON schema: `integer ≥ 1`, `true, false, auto`."""
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(values(choice) for choice in schema["anyOf"])
    names = {"boolean": "`true`, `false`", "string": "text", "array": "list", "object": "mapping", "null": "`null`"}
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    kind = names.get(schema.get("type", "object"), schema.get("type", ""))
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


def model_defaults() -> str:
    """Return the default shape of the model in one line."""
    shape = Config().model.model_dump()
    return " · ".join(
        f"`{name}` {show(value) if isinstance(value, str) else format(value, ',')}" for name, value in shape.items()
    )


MEMORY_LIMITS = (6, 8, 10, 12, 16, 24)  # GiB
MODEL_SIZES = (  # dim, loops, tokens per sequence
    *((512, 12, 1024), (1024, 12, 1024), (1024, 24, 1024), (1024, 12, 2048), (1024, 12, 4096)),
    *((1536, 12, 1024), (2048, 12, 1024), (2048, 24, 2048), (3072, 12, 1024)),
)


def memory() -> str:
    """Return the table of micro-batches that fit under each limit, for models of several sizes."""
    from savant_ray.model.transformer import n_parameters
    from savant_ray.training.memory import expected_fit

    rows = []
    for dim, n_loops, length in MODEL_SIZES:
        model = {"dim": dim, "n_heads": dim // 64, "n_loops": n_loops, "max_seq_len": length}
        row = [
            f"{dim:,}",
            str(n_loops),
            f"{length:,}",
            f"{n_parameters(Config.from_dict({'model': model}).model) / 1e6:.0f}",
        ]
        for limit_gb in MEMORY_LIMITS:
            fit = expected_fit(Config.from_dict({"model": model, "training": {"vram_limit_gb": float(limit_gb)}}))
            row.append("–" if fit is None else f"{fit.rows}{' R' if fit.recompute_loops else ''}")
        rows.append(row)
    sizes = ("`dim`", "`n_loops`", "`max_seq_len`", "million parameters")
    return table((*sizes, *(f"{limit_gb} GiB" for limit_gb in MEMORY_LIMITS)), rows)


# Commands and exit codes


def commands() -> str:
    """Return a section for each command, with its `--help`."""
    parts = []
    for name, command in COMMANDS.items():
        usage, _, settings_part = help_text(name).partition("\nsettings (")
        script = f" Also: `python jobs/{name}.py`." if (ROOT / f"jobs/{name}.py").is_file() else ""
        options = " Every [setting](settings.md) is an option as well." if settings_part else ""
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        parts.append(f"## savant {name}\n\n{summary}{script}{options}\n\n```text\n{usage.strip()}\n```\n")
    return "\n".join(parts)


def help_text(command: str) -> str:
    """Return what `savant COMMAND --help` prints in a terminal of 100 columns."""
    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS=HELP_COLUMNS, NO_COLOR="1"), contextlib.redirect_stdout(printed):
        with contextlib.suppress(SystemExit):
            COMMANDS[command].run(["--help"])
    return printed.getvalue()


def exit_codes() -> str:
    """Return the table of exit codes, with the exception that `savant_ray.train` raises for each."""
    kinds = sorted(errors.SavantError.__subclasses__(), key=lambda kind: kind.exit_code)
    stopped = "Training was stopped, normally after its current step was saved; the same command resumes it."
    rows = [
        ("0", "", "The command succeeded."),
        *((str(kind.exit_code), f"`{kind.__name__}`", first_line(kind)) for kind in kinds),
        (str(errors.STOPPED_EARLY), "", stopped),
        (str(INTERRUPTED), "`KeyboardInterrupt`", "Ctrl+C in any other command."),
    ]
    return table(("code", "exception", "meaning"), rows)


# Metrics


def events_of_a_run() -> str:
    """Return a section for each event of `metrics.jsonl`, with its fields."""
    parts = []
    for event in events.Event.__subclasses__():
        part = f"### {event.kind}\n\n{inspect.getdoc(event)}\n\n"
        fields = list(fields_of(event))
        parts.append(part + (table(("field", "type", "meaning"), fields) if fields else ""))
    text_counts = table(("field", "type", "meaning"), fields_of(events.TextCounts))
    return "\n".join([*parts, f"### TextCounts\n\n{inspect.getdoc(events.TextCounts)}\n\n{text_counts}"])


def fields_of(event: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and trailing comment of each field that the class itself declares."""
    declared = {field.name: str(field.type) for field in dataclasses.fields(event)}
    for line in inspect.getsource(event).splitlines():
        match = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if match and match[1] in declared:
            yield f"`{match[1]}`", f"`{declared[match[1]]}`", match[2] or ""


def ray_metrics() -> str:
    """Return the table of the metrics that a run exports through Ray."""
    from savant_ray.worker.metrics import METRICS

    kinds = {True: "counter", False: "gauge"}
    rows = [(f"`{metric.prometheus_name}`", kinds[metric.is_counter], metric.description) for metric in METRICS]
    return table(("metric", "type", "meaning"), rows)


# Python


def python_api() -> str:
    """Return a section for each public name of the package."""
    documented = {"train": api.train, "Result": api.Result, "Config": config.Config, "SavantError": errors.SavantError}
    undocumented = set(savant_ray.__all__) - set(documented) - {"__version__"}
    if undocumented:
        raise KeyError(f"docs/generate.py does not document {', '.join(sorted(undocumented))}")
    parts = [f"## {name}\n\n```python\n{signature(thing)}\n```\n\n{prose(thing)}" for name, thing in documented.items()]
    tree = textwrap.dedent((errors.__doc__ or "").split("\n\n")[1])
    return "\n\n".join([*parts, f"```text\n{tree}\n```\n"])


def signature(thing: Any) -> str:
    """Return the declaration of a function or class as it stands in the source, without its body."""
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    if isinstance(node, ast.FunctionDef):
        arguments = [ast.unparse(argument) for argument in node.args.args]
        defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        keywords = [f"{ast.unparse(name)} = {ast.unparse(default)}" for name, default in defaults if default]
        lines = "".join(f"    {argument},\n" for argument in [*arguments, "*", *keywords])
        return f"def {node.name}(\n{lines}) -> {ast.unparse(node.returns) if node.returns else 'None'}: ..."
    if not isinstance(node, ast.ClassDef):
        raise TypeError(f"{thing} is neither a function nor a class")
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    bases = f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    return "\n    ".join([f"class {node.name}{bases}:{'' if fields else ' ...'}", *fields])


def prose(thing: Any) -> str:
    """Return a docstring as Markdown, followed by the documented attributes of a class."""
    text = re.sub(r"^Raises:\n", "Raises:\n\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    body = node.body if isinstance(node, ast.ClassDef) else []
    attributes = [
        f"- `{ast.unparse(field.target)}`: {meaning.value.value}"
        for field, meaning in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(meaning, ast.Expr)
        and isinstance(meaning.value, ast.Constant)
        and isinstance(meaning.value.value, str)
    ]
    return "\n".join([text, "", *attributes]).strip()


# Files


class Entry(NamedTuple):
    """A file, or a folder and what is in it."""

    name: str
    meaning: str
    content: Sequence[Entry] = ()


def tree(root: Entry) -> str:
    """Return a drawing of a folder, with the meaning of each entry beside its name."""
    lines = [(root.name, root.meaning), *branches(root.content)]
    width = max(len(drawing) for drawing, _ in lines)
    return "```text\n" + "".join(f"{drawing:<{width}}  {meaning}\n" for drawing, meaning in lines) + "```\n"


def branches(entries: Sequence[Entry], indent: str = "") -> Iterator[tuple[str, str]]:
    """Yield a drawn branch and its meaning for each entry and for everything below it."""
    for entry in entries:
        branch, below = ("└── ", "    ") if entry is entries[-1] else ("├── ", "│   ")
        yield f"{indent}{branch}{entry.name}", entry.meaning
        yield from branches(entry.content, indent + below)


def run_folder() -> str:
    """Return the tree of a run folder."""
    from savant_ray.reporting import tensorboard
    from savant_ray.reporting.page import REPORT
    from savant_ray.reporting.record import METRICS, SAMPLES
    from savant_ray.reporting.run_report import LOG
    from savant_ray.training import profiling
    from savant_ray.training.checkpoint import CONFIG

    profile = [
        Entry(f"rank0-step100{profiling.TRACE}", "the operations of rank 0 from step 100 on"),
        Entry("rank0-step100-memory.pickle", "the use of GPU memory up to the end of the trace"),
        Entry("rank0-step100-out-of-memory.pickle", "the use of GPU memory until an attempt ran out of it"),
    ]
    files = [
        Entry("step_500/", "a checkpoint", checkpoint()),
        Entry(METRICS, "one JSON object per event: every step, validation and checkpoint"),
        Entry(SAMPLES, "the answers to validation.prompt"),
        Entry(LOG, "what the terminal showed, over all attempts"),
        Entry(CONFIG, "the settings of the newest attempt"),
        Entry(
            f"{tensorboard.FOLDER}/",
            f"the numbers of {METRICS}",
            [Entry("events.out.tfevents.…", "from one start of the workers on")],
        ),
        Entry(f"{profiling.FOLDER}/", "with training.profile", profile),
        Entry(REPORT, "written by savant report"),
        Entry(errors.TRACEBACK, "the traceback of an unexpected error, if there was one"),
    ]
    return tree(Entry("checkpoints_quickstart/", "<run.storage_path>/<run.name>", files))


def checkpoint() -> Sequence[Entry]:
    """Return the files of a checkpoint."""
    from savant_ray.data.chat_template import SETTINGS_FILE, TEMPLATE_FILE
    from savant_ray.reporting.record import METRICS
    from savant_ray.training.checkpoint import CONFIG, MANIFEST, RECORDS, TOKENIZER, state_file

    return [
        Entry(state_file("step_500"), "weights, optimizer and position"),
        Entry(CONFIG, "the settings"),
        Entry(TOKENIZER, "the tokenizer"),
        Entry(TEMPLATE_FILE, "the chat template of the tokenizer, if it has one"),
        Entry(SETTINGS_FILE, "the special tokens of the chat template, if there is one"),
        Entry(RECORDS, f"the lines of {METRICS} that the driver may not have recorded"),
        Entry(MANIFEST, "step, data fingerprint, size and SHA-256 of each file; written last"),
    ]


def other_files_of_a_run() -> str:
    """Return the table of files that the program itself needs in a run folder, or that are there for some time."""
    from savant_ray.reporting.record import DAMAGED_COPY, METRICS
    from savant_ray.storage.local import DAMAGED
    from savant_ray.storage.lock import LOCK, OLD
    from savant_ray.storage.object_store import UNSENT
    from savant_ray.storage.ray_snapshot import SNAPSHOT
    from savant_ray.training.checkpoint import REPLACED, TEMPORARY, left_out_file, state_file

    rows = [
        (LOCK, "the process that trains the run"),
        (".validate_storage_marker", "written by Ray Train when it checks the storage"),
        (SNAPSHOT, "Ray Train's list of checkpoints; rewritten at each start"),
        (f"step_500{DAMAGED}/", "a damaged checkpoint that was set aside; it is never deleted"),
        (f"step_500.<random>{TEMPORARY}/", "a checkpoint that is being written or deleted"),
        (f"step_500{REPLACED}/", "a checkpoint that is being replaced"),
        (f"step_500{UNSENT}/", "with object storage: a checkpoint that could not be uploaded"),
        (
            state_file("step_500"),
            "a file of the original script; the newest one is converted into `step_500/` if no checkpoint is newer; these "
            "files are never changed or deleted",
        ),
        (
            f"{METRICS}{DAMAGED_COPY}",
            "a copy of the record as it was before damaged lines were removed (the next: `-2`, …)",
        ),
        (
            left_out_file("<text>"),
            "the sequences that `training.on_spike: rewind` has left out: pairs of the first position and the number of "
            "sequences; read by each start and by `savant verify`",
        ),
        ("<file>.tmp", "a file that is being written"),
        (f"<run.name>{OLD}/", "beside the run folder: the earlier run of this name, after `--fresh`"),
    ]
    return table(("name", "meaning"), [(f"`{name}`", meaning) for name, meaning in rows])


def cache_folder() -> str:
    """Return the tree of `data.cache_dir`."""
    from savant_ray.data import content, deduplication, hub, overlap
    from savant_ray.data.cache_builder import LOCK, TRAINED_TOKENIZER, UNFINISHED
    from savant_ray.data.chat_template import SETTINGS_FILE, TEMPLATE_FILE
    from savant_ray.data.shard_writer import shard_name, summary_path
    from savant_ray.data.token_cache import CHECKED, MANIFEST
    from savant_ray.data.tokenizer import TOKENIZER_FILE
    from savant_ray.driver.data_preparation import USED_TOKENIZER
    from savant_ray.training import compiler_cache

    shard = Path(shard_name(0))
    rows = [
        Entry(shard.name, "packed tokens of a part of a file or of small files, in Arrow's IPC format"),
        Entry(overlap.digests_path(shard).name, "64-bit digest of each of its documents"),
        Entry(summary_path(shard).name, "counts of the files and CRC-32 of the shard"),
        Entry(MANIFEST, "totals and list of shards; written last"),
        Entry(CHECKED, "size and times of the shards whose CRC-32 was verified"),
    ]
    duplicates = [
        Entry(deduplication.scan_path(Path(), 0).name, "digests of a shard, until the duplicates have been found"),
        Entry(deduplication.duplicates_path(Path(), 0).name, "the duplicates in a shard"),
        Entry(deduplication.MARKED, "written when the duplicates in all shards have been found"),
    ]
    tokenizer = [
        Entry(TOKENIZER_FILE, "the tokenizer"),
        Entry(TEMPLATE_FILE, "its chat template, if it has one"),
        Entry(SETTINGS_FILE, "the special tokens of the chat template, if there is one"),
    ]
    files = [
        Entry("<name>-<hash>/", "token cache of a source, named after its first file", rows),
        Entry(f"<name>-<hash>{UNFINISHED}/", "token cache that is being built; with data.deduplicate also", duplicates),
        Entry(f"<name>-<hash>{LOCK}", "lock of the build of a token cache"),
        Entry(f"{TRAINED_TOKENIZER}<hash>-<checksum>.json", "tokenizer that was trained on the text"),
        Entry(f"{TRAINED_TOKENIZER}<hash>{LOCK}", "lock of the training of this tokenizer"),
        Entry(f"{USED_TOKENIZER}<hash>/", "tokenizer of a run, for its workers", tokenizer),
        Entry(f"{overlap.OVERLAP}<hash>.json", "number of validation documents that are in the training text"),
        Entry(f"{overlap.DUPLICATES}<hash>.json", "number of duplicates in each source"),
        Entry(content.HASHES, "SHA-256 of each file of the text"),
        Entry(f"{hub.FOLDER}/", "downloads from the Hugging Face Hub and lists of the files there"),
        Entry(f"{compiler_cache.FOLDER}/", "compiled code of the model, by PyTorch"),
    ]
    return tree(Entry("cache/", "data.cache_dir", files))


def text_folder() -> str:
    """Return the tree of the folder with the quickstart's text."""
    from savant_ray.commands import QUICKSTART_FOLDER
    from savant_ray.data.quickstart import CHAT_FILE, GENIUS_FILE, TRAIN_FILE, VALIDATION_FILE

    files = [
        Entry(TRAIN_FILE, "prose and word problems"),
        Entry(VALIDATION_FILE, "held-out prose and problems"),
        Entry(GENIUS_FILE, "problems of all templates"),
        Entry(CHAT_FILE, "conversations, for configs/chat.yaml"),
    ]
    return tree(Entry(f"{QUICKSTART_FOLDER}/", "in the working directory", files))


def source_files() -> str:
    """Return the package as a tree, with the first sentence of each module's docstring."""
    package = ROOT / "savant_ray"
    return tree(Entry("savant_ray/", module_summary(package / "__init__.py"), modules(package)))


def modules(folder: Path) -> list[Entry]:
    """Return everything in a package: modules first, then subpackages."""
    files = tracked_files(f"{folder.relative_to(ROOT)}/*.py")
    own = [path for path in files if path.parent == folder and path.name != "__init__.py"]
    packages = [path for path in files if path.parent.parent == folder and path.name == "__init__.py"]
    return [
        *(Entry(path.name, module_summary(path)) for path in own),
        *(
            Entry(f"{path.parent.name}/", module_summary(path), modules(path.parent))
            for path in packages
            if path.read_text(encoding="utf-8")
        ),
    ]


def module_summary(module: Path) -> str:
    """Return the first line of a module's docstring.

    Raises:
        ValueError: it has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{module.relative_to(ROOT)} has no docstring")
    return docstring.splitlines()[0].removesuffix(".")


def first_line(thing: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "model defaults": model_defaults,
    "memory": memory,
    "commands": commands,
    "exit codes": exit_codes,
    "events": events_of_a_run,
    "ray metrics": ray_metrics,
    "python api": python_api,
    "run folder": run_folder,
    "other files of a run": other_files_of_a_run,
    "cache folder": cache_folder,
    "text folder": text_folder,
    "source files": source_files,
}


if __name__ == "__main__":
    main()
