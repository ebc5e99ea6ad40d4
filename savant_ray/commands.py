"""The commands: options and the function that each of them calls.

Modules are imported inside the commands, so that `savant --help` is fast and errors in settings are reported before torch
and Ray are loaded.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from savant_ray.command_line import (
    count,
    depths,
    file_path,
    load_settings,
    loops,
    new_parser,
    new_tokens,
    output_file,
    parse_with_original_settings,
    parse_with_settings,
    port,
    refuse_deleted_folder,
    replicas,
    seed,
    split_settings,
    step_range,
    temperature,
    trials,
    utf8_text,
)
from savant_ray.errors import SavantError, SettingsError, explain, print_error

if TYPE_CHECKING:
    from savant_ray.config import Config

QUICKSTART_FOLDER = Path("dataset")
CHECKPOINT_HELP = "run folder, step_N folder in it, or file of the original script; also s3://…"


class Command(NamedTuple):
    """A subcommand of `savant`."""

    run: Callable[[Sequence[str]], int]
    summary: str
    prints_result: bool = True  # whether the output is the result, so that the command fails if it cannot be written


def _train(arguments: Sequence[str]) -> int:
    code, _ = _run_training(_parser("train", settings=True), arguments)
    return code


def _quickstart(arguments: Sequence[str]) -> int:
    from savant_ray.settings.files import shipped_files

    parser = new_parser("quickstart", COMMANDS["quickstart"].summary, settings=True, shows_config=False)
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        raise SettingsError("--config: savant quickstart has its own settings file; use savant train for another one")
    code, config = _run_training(parser, ["--config", str(shipped_files()["quickstart"]), *arguments])
    if code == 0:
        from savant_ray.reporting.wording import next_commands
        from savant_ray.storage.run_storage import run_storage

        storage = run_storage(config)
        print(f"\nTo try next:\n{next_commands(storage.location, storage.folder, COMMANDS)}")
    return code


def _run_training(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[int, Config]:
    """Train with the settings of the arguments; return the exit code, and the settings with absolute paths."""
    parser.add_argument("--fresh", action="store_true", help="start a new run; rename an existing run of that name")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although model, tokenizer or text differ from the checkpoint, and load the weights that fit",
    )
    options, config = parse_with_settings(parser, arguments)
    from savant_ray.cluster.session import ExitWithoutShutdown, exit_without_shutdown
    from savant_ray.driver import resolve_paths, train

    try:
        config = resolve_paths(config)
        code = train(config, fresh=options.fresh, allow_changes=options.allow_changes, verbose=options.verbose)
    except ExitWithoutShutdown as end:
        code = exit_without_shutdown(end.code if end.error is None else print_error(end.error, options.verbose))
    return code, config


def _prepare(arguments: Sequence[str]) -> int:
    parser = _parser("prepare", settings=True)
    parser.add_argument("--quickstart", action="store_true", help="generate the quickstart's text files in dataset/")
    parser.add_argument("--force", action="store_true", help="with --quickstart: replace existing files")
    options, config = parse_with_settings(parser, arguments)
    if options.force and not options.quickstart:
        parser.error("--force requires --quickstart")
    if options.quickstart:
        if options.config is None and parser.parse_known_args(arguments)[1]:
            parser.error("--quickstart without --config only writes the text; settings have no effect")
        from savant_ray.data.quickstart import write_quickstart

        write_quickstart(QUICKSTART_FOLDER, force=options.force)
        if options.config is None:
            return 0
    refuse_deleted_folder()
    from savant_ray.driver import prepare, resolve_paths

    prepare(resolve_paths(config), verbose=options.verbose)
    return 0


def _data(arguments: Sequence[str]) -> int:
    parser = _parser("data", settings=True, arguments="[SOURCE …]")
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="*", help="files, folders, globs or URIs [data.sources of the settings]"
    )
    parser.add_argument("--full", action="store_true", help="read all of each source instead of a sample of 8 MiB")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the figures to this file")
    own_arguments, settings = split_settings(arguments)  # a path must not be taken for the value of a setting
    options, unknown = parser.parse_known_args(own_arguments)
    if options.sources:
        entries = json.dumps([{"path": path, "weight": 1} for path in options.sources])
        settings += ["--data.sources", entries, "--data.quickstart", "false"]  # its files are not among the sources
    config = load_settings(parser, options, [*unknown, *settings])
    refuse_deleted_folder()
    from savant_ray.driver import resolve_paths
    from savant_ray.driver.data_statistics import data_statistics
    from savant_ray.reporting.text_tables import print_text_statistics

    sources, plan = data_statistics(resolve_paths(config), full=options.full)
    print_text_statistics(sources, plan)
    if options.json is not None:
        _write_json(options.json, {"sources": sources, **plan})
    return 0


def _sweep(arguments: Sequence[str]) -> int:
    parser = _parser("sweep", settings=True, arguments="--space FILE.yaml")
    parser.add_argument(
        "--space", type=file_path, metavar="FILE.yaml", required=True, help="settings to vary and their distributions"
    )
    parser.add_argument(
        "--trials",
        type=trials,
        metavar="N",
        default=8,
        help="number of trials; with a grid: trials of each combination [8]",
    )
    parser.add_argument("--concurrent", type=trials, metavar="N", default=1, help="trials that run at once [1]")
    parser.add_argument(
        "--no-early-stopping",
        action="store_true",
        help="train all trials to the end, instead of stopping poor ones (ASHA)",
    )
    options, config = parse_with_settings(parser, arguments)
    refuse_deleted_folder()
    from savant_ray.driver import resolve_paths
    from savant_ray.sweep.search import sweep

    return sweep(
        resolve_paths(config),
        options.space,
        options.trials,
        options.concurrent,
        stops_early=not options.no_early_stopping,
        verbose=options.verbose,
    )


def _generate(arguments: Sequence[str]) -> int:
    parser = _parser("generate", takes_original=True)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        required=True,
        help=CHECKPOINT_HELP,
    )
    parser.add_argument("--prompt", type=utf8_text, metavar="TEXT", required=True, help="text to complete")
    _add_generation_options(parser)
    _add_sampling_options(parser)
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write prompt, text and checkpoint to this file"
    )
    options, settings = parse_with_original_settings(parser, arguments)
    refuse_deleted_folder()
    from savant_ray.evaluation.from_checkpoint import stream_answer
    from savant_ray.storage.run_storage import local_checkpoint

    with local_checkpoint(options.checkpoint, settings=settings) as checkpoint:
        pieces = stream_answer(
            checkpoint,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            n_loops=options.loops,
            raw_weights=options.raw_weights,
        )
        text = _print_answer(options.prompt, pieces)
    if options.json is not None:
        _write_json(options.json, {"prompt": options.prompt, "text": text, "checkpoint": options.checkpoint})
    return 0


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=new_tokens,
        metavar="N",
        help="maximum length of the answer, tokens [validation.max_new_tokens of the run]",
    )
    _add_loops_option(parser)
    _add_weights_option(parser)


def _add_weights_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw-weights",
        action="store_true",
        help="use the weights of the last step instead of their average [the average if the run has training.ema_decay]",
    )


def _add_loops_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loops",
        type=loops,
        metavar="N",
        help="number of times that the recurrent block is applied [model.n_loops of the run]",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=temperature,
        metavar="T",
        help="sampling temperature; 0: always the most likely token [validation.temperature of the run]",
    )
    parser.add_argument("--seed", type=seed, metavar="N", default=0, help="seed of the sampling [0]")


def _chat(arguments: Sequence[str]) -> int:
    parser = _parser("chat", takes_original=True)
    parser.add_argument("checkpoint", metavar="RUN", help=CHECKPOINT_HELP)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--conversation",
        action="store_true",
        help="answer messages, rendered by the chat template or as Question: …, Answer: … [default if the model has a "
        "chat template or is trained on conversations]",
    )
    form.add_argument(
        "--plain", action="store_true", help="continue each message as a text of its own [default otherwise]"
    )
    parser.add_argument("--system", type=utf8_text, metavar="TEXT", default="", help="system message [none]")
    _add_generation_options(parser)
    _add_sampling_options(parser)
    options, settings = parse_with_original_settings(parser, arguments)
    refuse_deleted_folder()
    from savant_ray.chat.conversation import Conversation, is_for_conversations
    from savant_ray.chat.terminal import ChatTerminal
    from savant_ray.evaluation.from_checkpoint import load_model
    from savant_ray.storage.run_storage import local_checkpoint

    with local_checkpoint(options.checkpoint, settings=settings) as checkpoint:
        model, tokenizer, config = load_model(checkpoint, options.raw_weights)
    continues_text = options.plain or not (options.conversation or is_for_conversations(config, tokenizer))
    conversation = Conversation(model, tokenizer, config, continues_text, options.max_new_tokens, options.seed)
    if options.temperature is not None:
        conversation.temperature = options.temperature
    if options.loops is not None:
        conversation.n_loops = options.loops
    if options.system:
        conversation.set_system(options.system)
    return ChatTerminal(conversation).run(options.checkpoint)


def _evaluate(arguments: Sequence[str]) -> int:
    parser = _parser("evaluate", takes_original=True)
    parser.add_argument("checkpoint", metavar="RUN", help=CHECKPOINT_HELP)
    parser.add_argument("--suite", choices=("logic",), default="logic", help="built-in questions [logic]")
    parser.add_argument(
        "--problems",
        type=file_path,
        metavar="FILE.jsonl",
        help="your own questions instead; each line has prompt and answer",
    )
    _add_generation_options(parser)
    parser.add_argument(
        "--depths",
        type=depths,
        metavar="N,N,…",
        help="print score and loss for each of these numbers of loops, such as 1,2,4,8,16,32, instead of scores by template",
    )
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="also write scores and answers (with --depths: the table) to this file",
    )
    options, settings = parse_with_original_settings(parser, arguments)
    if options.depths and options.loops is not None:
        parser.error("--depths and --loops exclude each other")
    refuse_deleted_folder()
    from savant_ray.evaluation.from_checkpoint import answers_of, by_depth, evaluation_result
    from savant_ray.evaluation.logic_suite import logic_suite, read_questions
    from savant_ray.reporting.scores import print_depths, print_scores, with_progress
    from savant_ray.storage.run_storage import local_checkpoint

    questions = logic_suite() if options.problems is None else read_questions(options.problems)
    with local_checkpoint(options.checkpoint, settings=settings) as checkpoint:
        if options.depths:
            by_loops = by_depth(checkpoint, questions, options.depths, options.max_new_tokens, options.raw_weights)
            scored = {"depths": list(with_progress(by_loops, len(options.depths)))}
        else:
            answers = answers_of(checkpoint, questions, options.max_new_tokens, options.loops, options.raw_weights)
            scored = evaluation_result(list(with_progress(answers, len(questions))))
    (print_depths if options.depths else print_scores)(scored)
    if options.json is not None:
        _write_json(options.json, {"checkpoint": options.checkpoint, **scored})
    return 0


def _serve(arguments: Sequence[str]) -> int:
    parser = _parser("serve", takes_original=True)
    parser.add_argument("checkpoint", metavar="RUN", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--name",
        type=utf8_text,
        metavar="NAME",
        default="",
        help="name of the model in requests [name of the run folder]",
    )
    parser.add_argument(
        "--host", type=utf8_text, metavar="ADDRESS", default="127.0.0.1", help="address to listen on [127.0.0.1]"
    )
    parser.add_argument("--port", type=port, metavar="N", default=8000, help="port to listen on [8000]")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that requests must have; needed if --host is not a loopback address [SAVANT_API_KEY of the environment]",
    )
    parser.add_argument(
        "--replicas", type=replicas, metavar="N", default=(1, 1), help="number of replicas, or a range such as 1-4 [1]"
    )
    parser.add_argument(
        "--max-batch", type=count, metavar="N", default=16, help="answers that a replica decodes together [16]"
    )
    parser.add_argument(
        "--max-queue", type=count, metavar="N", default=64, help="requests that may wait; further ones are refused [64]"
    )
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="maximum length of prompt and answer together, tokens [model.max_seq_len of the run]",
    )
    _add_loops_option(parser)
    _add_weights_option(parser)
    options, original = parse_with_original_settings(parser, arguments)
    refuse_deleted_folder()
    from savant_ray.cluster.session import ExitWithoutShutdown, exit_without_shutdown, prepare_environment

    prepare_environment()
    try:
        from savant_ray.serving.openai_api import ServerSettings
        from savant_ray.serving.server import run_server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("savant_ray"):
            raise
        raise SavantError(
            "`savant serve` needs Ray Serve: pip install 'savant-ray[serve]' (in a checkout: make extras)"
        ) from error
    values = {name: value for name, value in vars(options).items() if name not in ("config", "verbose")}
    try:
        run_server(ServerSettings(original=original, **values), options.verbose)
    except ExitWithoutShutdown as end:
        return exit_without_shutdown(end.code if end.error is None else print_error(end.error, options.verbose))
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = _parser("export", takes_original=True)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument(
        "--format",
        choices=("original", "safetensors", "hf"),
        required=True,
        help="original: a file that the original script loads; safetensors: a folder with weights, settings and tokenizer; "
        "hf: a folder that transformers and lm-eval load",
    )
    parser.add_argument("--output", type=file_path, metavar="PATH", required=True, help="file or folder to write")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        help="with --format original: optimizer of the original script, PyTorch's AdamW or bitsandbytes' AdamW8bit "
        "[that of the newest step_X.pt in the run folder]",
    )
    _add_weights_option(parser)
    options, settings = parse_with_original_settings(parser, arguments)
    if options.optimizer and options.format != "original":
        parser.error("--optimizer requires --format original")
    if settings and options.format == "original":
        parser.error("settings require --format safetensors or hf; --format original takes none")
    refuse_deleted_folder()
    from savant_ray.storage.run_storage import fetched, local_checkpoint

    if options.format == "original":
        from savant_ray.original.export import export_original

        with fetched(options.checkpoint, with_original=True) as checkpoint:
            for warning in export_original(checkpoint, options.output, options.optimizer):
                print(f"warning: {warning}", file=sys.stderr)
    else:
        if options.format == "hf":
            from savant_ray.export.hugging_face import export_hugging_face as export
        else:
            from savant_ray.training.safetensors_export import export_safetensors as export
        with local_checkpoint(options.checkpoint, settings=settings, with_record=options.format == "hf") as checkpoint:
            export(checkpoint, options.output, options.raw_weights)
    print(f"{options.output} is written")
    return 0


def _runs(arguments: Sequence[str]) -> int:
    parser = _parser("runs")
    parser.add_argument(
        "folders",
        type=file_path,
        metavar="FOLDER",
        nargs="*",
        help="folders to search [the current one and the home folder, below which Ray jobs store runs]",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(arguments)
    from savant_ray.locations import home_folder
    from savant_ray.original.names import newest_by_name
    from savant_ray.reporting.runs import find_runs, print_table, summarize, to_json
    from savant_ray.storage.lock import is_in_use

    if missing := [str(folder) for folder in options.folders if not folder.exists()]:
        raise SettingsError(f"{', '.join(missing)}: no such folder")
    folders = options.folders or [Path()]
    if not options.folders:
        with suppress(SettingsError):  # a user without a home folder has no runs there
            folders.append(home_folder())  # because Ray jobs store runs in `savant_runs` in it
    runs = []
    for folder in find_runs(folders, newest_by_name):
        try:
            runs.append(summarize(folder, is_in_use, newest_by_name))
        except (OSError, SavantError) as error:  # such as the run of another user, who does not let others read it
            print(f"left out: {explain(error)}", file=sys.stderr)
    if options.json:
        print(to_json(runs))
    elif runs:
        print_table(runs)
    else:
        print("no runs found; `savant train` starts one, `savant runs FOLDER` searches another folder")
    return 0


def _status(arguments: Sequence[str]) -> int:
    parser = _parser("status")
    parser.add_argument("run", type=file_path, metavar="RUN", help="run folder, or file of the original script")
    options = parser.parse_args(arguments)
    from savant_ray.original.names import newest_by_name
    from savant_ray.reporting.runs import status, summarize
    from savant_ray.storage.lock import is_in_use

    print(status(summarize(options.run, is_in_use, newest_by_name)))
    return 0


def _report(arguments: Sequence[str]) -> int:
    parser = _parser("report")
    parser.add_argument("runs", type=file_path, metavar="RUN", nargs="+", help="run folder; several are compared")
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="FILE.html",
        help="file to write [RUN/report.html, with several runs ./report.html]",
    )
    options = parser.parse_args(arguments)
    from savant_ray.reporting.page import REPORT, write_page
    from savant_ray.storage.lock import is_in_use

    path = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / REPORT
    write_page(options.runs, path, is_in_use)
    print(f"{path} is written; open it in a browser")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _parser("verify")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--steps",
        type=step_range,
        metavar="A..B",
        default=(None, None),
        help="steps to compare, or a single one; A or B may be left out [from the initial weights, or the oldest kept "
        "checkpoint, to the newest one]",
    )
    options = parser.parse_args(arguments)
    refuse_deleted_folder()
    from savant_ray.driver import verify

    first, last = options.steps
    print(verify(options.run, first, last, options.verbose))
    return 0


def _config(arguments: Sequence[str]) -> int:
    _, config = parse_with_settings(_parser("config", settings=True), arguments)
    from savant_ray.config import dump_yaml

    print(dump_yaml(config), end="")
    return 0


def _init(arguments: Sequence[str]) -> int:
    parser = _parser("init")
    parser.add_argument(
        "texts", type=utf8_text, metavar="TEXT", nargs="*", help="files, folders, globs or URIs of your text"
    )
    parser.add_argument(
        "--output", type=file_path, metavar="FILE.yaml", default=Path("mine.yaml"), help="file to write [mine.yaml]"
    )
    options = parser.parse_args(arguments)
    refuse_deleted_folder()
    from savant_ray.config import Config, DataConfig
    from savant_ray.locations import is_uri
    from savant_ray.reporting.wording import own_command
    from savant_ray.settings.starter import starter_text, write_new
    from savant_ray.settings.yaml_text import load_yaml

    local = [text for text in options.texts if not is_uri(text)]
    plain_text = False
    if local:
        from savant_ray.data.sources import expand

        plain_text = {file.format for file in expand(local, cache_dir=DataConfig().cache_dir)} == {"text"}
    content = starter_text(f"checkpoints_{options.output.stem}", options.texts, text_blocks=plain_text)
    Config.from_dict(load_yaml(content))
    write_new(options.output, content)
    file = shlex.quote(str(options.output))
    print(f"{options.output} is written. Look at it, then:")
    print(f"  {own_command('data')} --config {file}\n      shows what the text is read as, and what is invalid in it")
    print(f"  {own_command('train')} --config {file}\n      trains, or resumes")
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    _parser("doctor").parse_args(arguments)
    refuse_deleted_folder()
    from savant_ray.doctor import diagnose, print_findings

    return 1 if print_findings(diagnose()) else 0


def _completion(arguments: Sequence[str]) -> int:
    from savant_ray.completion import INSTALLATION, CommandHelp, completion_script

    parser = _parser("completion")
    parser.add_argument("shell", choices=tuple(INSTALLATION), help="shell that executes the script")
    options = parser.parse_args(arguments)
    helps = {name: CommandHelp(command.summary, _help(command)) for name, command in COMMANDS.items()}
    print(completion_script(options.shell, helps), end="")
    return 0


def _help(command: Command) -> str:
    """Return what `--help` of a command prints."""
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        command.run(["--help"])
    return printed.getvalue()


def _benchmark(arguments: Sequence[str]) -> int:
    parser = _parser("benchmark")
    names = "train, attention, loss, generate, checkpoint, precision, data, ray, scaling or start"
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"{names} [all of them]")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the measurements to this file")
    options = parser.parse_args(arguments)
    refuse_deleted_folder()
    from savant_ray.benchmarks.registry import run

    run(options.name, options.json)
    return 0


COMMANDS = {
    "quickstart": Command(_quickstart, "train a small model on generated text, or resume it", prints_result=False),
    "train": Command(_train, "train a run, or resume it", prints_result=False),
    "prepare": Command(
        _prepare, "tokenize and pack the training text; `train` does this automatically", prints_result=False
    ),
    "data": Command(_data, "show what is in the training text: counts, lengths, invalid records, examples"),
    "runs": Command(_runs, "list runs with state, step, loss and last checkpoint"),
    "status": Command(_status, "print the state of a run in five lines"),
    "report": Command(_report, "write an HTML page about a run, or about several side by side", prints_result=False),
    "verify": Command(_verify, "repeat recorded steps and compare them with the run, bit for bit"),
    "sweep": Command(_sweep, "train one run per combination of settings, and compare them", prints_result=False),
    "generate": Command(_generate, "complete a prompt with a checkpoint"),
    "chat": Command(_chat, "talk to a model: questions and answers, or texts that it continues"),
    "evaluate": Command(_evaluate, "score a checkpoint on logic problems, or on your own questions"),
    "serve": Command(_serve, "serve a checkpoint with OpenAI's API, on Ray Serve", prints_result=False),
    "export": Command(_export, "convert a checkpoint for other programs", prints_result=False),
    "init": Command(_init, "write a settings file for your own text", prints_result=False),
    "doctor": Command(_doctor, "check this machine for what training requires"),
    "completion": Command(_completion, "print a script with which your shell completes commands and settings"),
    "config": Command(_config, "print the complete settings"),
    "benchmark": Command(_benchmark, "benchmark parts of the program against straightforward implementations"),
}


def _parser(
    command: str, settings: bool = False, takes_original: bool = False, arguments: str = ""
) -> argparse.ArgumentParser:
    return new_parser(command, COMMANDS[command].summary, settings, takes_original, arguments=arguments)


def _print_answer(prompt: str, pieces: Iterator[str]) -> str:
    """Print the prompt, then the answer while it is generated; return the answer.

    Control characters are escaped if standard output is a terminal.
    """
    from savant_ray.reporting.wording import escape_controls

    show = escape_controls if sys.stdout.isatty() else str
    text = next(pieces, "")  # before anything is printed, because loading the checkpoint may fail
    print(show(prompt) + show(text), end="", flush=True)
    for piece in pieces:
        text += piece
        print(show(piece), end="", flush=True)
    print()
    return text


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from savant_ray.reporting.record import non_finite_as_none

    try:
        text = json.dumps(non_finite_as_none(content), ensure_ascii=False, indent=2) + "\n"
        path.write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )  # a lone surrogate is written as an escape sequence
    except OSError as error:
        raise SavantError(f"--json {path}: {error.strerror}") from error
