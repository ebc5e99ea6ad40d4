"""`savant export --format hf`: what is in the folder, without transformers."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from savant_ray.cli import main
from savant_ray.config import Config, ModelConfig
from savant_ray.data.tokenizer import Tokenizer
from savant_ray.errors import CheckpointError, SavantError, SettingsError
from savant_ray.events import LogicScored, StepDone, ValidationDone
from savant_ray.export.hugging_face import export_hugging_face
from savant_ray.export.model_card import model_card
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.reporting.record import to_line
from savant_ray.settings.yaml_text import load_yaml
from tests.data.albert_like import CLS, FOLDER, SEP
from tests.export.conftest import WriteRun, read_json
from tests.original.test_file import trained
from tests.original.word_tokenizer import write_tokenizer
from tests.storage.object_store import ObjectStore
from tests.training.tiny import MODEL

FILES = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "lm_eval", "model.safetensors"),
    *("modeling_savant.py", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "exported"


def test_the_command_writes_a_folder_with_weights_code_settings_tokenizer_card_and_task(
    write_run: WriteRun, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run()
    assert main(["export", str(run), "--format", "hf", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output} is written\n"
    assert {path.name for path in output.iterdir()} == FILES
    assert [path.name for path in output.parent.iterdir()] == ["exported"]
    weights = torch.load(run / "step_3/step_3.pt", weights_only=True)["model_state_dict"]
    torch.testing.assert_close(load_file(output / "model.safetensors"), weights, rtol=0, atol=0)


@pytest.mark.parametrize("file_format", ["hf", "safetensors"])
def test_the_weights_can_be_read_by_whom_the_other_files_can(
    file_format: str, write_run: WriteRun, output: Path
) -> None:
    assert main(["export", str(write_run()), "--format", file_format, "--output", str(output)]) == 0
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode


def test_the_code_in_the_folder_needs_nothing_of_savant_ray(write_run: WriteRun, output: Path) -> None:
    export_hugging_face(write_run(), output)
    for path in output.rglob("*.py"):
        assert "savant_ray." not in path.read_text().replace("savant_ray.data.conversations", "")
        compile(path.read_text(), path, "exec")


def test_every_setting_of_the_model_is_in_its_config(write_run: WriteRun, output: Path) -> None:
    model = {"dim": 24, "n_heads": 3, "n_loops": 5, "max_seq_len": 40, "window_size": 7, "global_every": 3}
    export_hugging_face(write_run(model=model | {"soft_cap": 7.5, "positions": "rotary"}), output)
    names = {"dim": "hidden_size", "n_heads": "num_attention_heads", "n_loops": "num_loops"}
    names["max_seq_len"] = "max_position_embeddings"
    expected = {names.get(name, name): value for name, value in model.items()}
    config = read_json(output / "config.json")
    assert expected.items() <= config.items()
    assert (config["vocab_size"], config["soft_cap"], config["positions"]) == (320, 7.5, "rotary")


def test_the_card_has_the_figures_of_the_run_up_to_the_checkpoint_and_no_paths(
    write_run: WriteRun, output: Path, tmp_path: Path
) -> None:
    run = write_run(data={"sources": [{"path": str(tmp_path / "secret.jsonl"), "weight": 1}]})
    write_record(run)
    export_hugging_face(run, output)
    card = (output / "README.md").read_text()
    assert "# test_run\n" in card and "| training | 3 of " in card
    assert "| training loss | 1.2500 nats per token (step 3) |" in card
    assert "| validation loss | 1.5000 nats per token, not finite bits per byte (step 3) |" in card
    assert "| logic suite | 90 % of 600 held-out problems, 95 % interval 88 % – 92.0 % (step 3) |" in card
    assert str(tmp_path) not in card and "secret" not in card


def test_the_card_says_with_how_many_loops_the_model_works(write_run: WriteRun, output: Path) -> None:
    export_hugging_face(write_run(training={"double_loops_fraction": 0.3}), output)
    n_loops = MODEL["n_loops"]
    assert f"with\n{n_loops} and with {2 * n_loops}." in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "damaged",
    [
        '{"event": "step", "time": "2026-11-25T03:19:47.281+00:00", "step": 3}',
        '{"event": "step", "time": "2026-11-25T03:19:47.281+00:00", "step": 3, "train_loss": "low"}',
        '{"event": "score", "time": "2026-11-25T03:19:47.281+00:00", "step": 3, "score": null, "low": [], "n": "x"}',
        '{"event": "validation", "time": "2026-11-25T03:19:47.281+00:00", "step": "3"}',
        "[[",
    ],
)
def test_damaged_lines_of_the_record_are_left_out_of_the_card(write_run: WriteRun, output: Path, damaged: str) -> None:
    run = write_run()
    loss = {"event": "step", "time": "2026-11-25T03:19:47.281+00:00", "step": 2, "train_loss": 1.25}
    (run / "metrics.jsonl").write_text(f"{json.dumps(loss)}\n{damaged}\n")
    export_hugging_face(run, output)
    card = (output / "README.md").read_text()
    assert "| training loss | 1.2500 nats per token (step 2) |" in card
    assert "logic suite |" not in card


def test_the_name_of_the_run_is_text_in_the_card(write_run: WriteRun, output: Path) -> None:
    run = write_run()
    settings = (run / "step_3/config.yaml").read_text()
    names = {"a_run": "a_run", "*x* <b>": r"\*x\* \<b\>", "_x_ [y](z) #{steps}": r"\_x\_ \[y\](z) \#{steps}"}
    for name, shown in names.items():
        config = Config.from_dict(load_yaml(settings) | {"run": {"name": name}})
        assert f"\n# {shown}\n" in model_card(run / "step_3", 3, config, Tokenizer.load(run / "step_3"))


def test_the_card_of_a_run_in_object_storage_has_its_figures(
    write_run: WriteRun,
    store: ObjectStore,
    output: Path,
) -> None:
    run = write_run()
    write_record(run)
    for path in run.rglob("*.*"):
        store.write(f"runs/run/{path.relative_to(run)}", path.read_bytes())
    assert main(["export", store.uri("runs/run"), "--format", "hf", "--output", str(output)]) == 0
    assert "| validation loss | 1.5000 nats" in (output / "README.md").read_text()


def write_record(run: Path) -> None:
    """Write the record of a run that is one step ahead of its checkpoint, with half a line at the end."""
    step = {"learning_rate": 1, "grad_norm": 1, "tokens": 1, "tokens_per_second": 1, "skipped_micro_batches": 0}
    step |= {"micro_batch_size": 1, "memory_gb": 1, "data_wait_seconds": 1, "compute_seconds": 1, "reduce_seconds": 1}
    step |= {"update_seconds": 1, "step_seconds": 1}
    score = {"n": 600, "low": 0.88, "high": 0.92, "templates": {}, "final": True, "seconds": 1}
    events = [
        StepDone(step=3, train_loss=1.25, **step),
        ValidationDone(step=3, validation_loss=1.5, bits_per_byte=float("nan"), weights_moved=None, seconds=1),
        LogicScored(step=3, score=0.9, **score),
        StepDone(step=4, train_loss=0.125, **step),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(to_line(event)) + "\n" for event in events) + '{"event": "st')


def test_tokens_that_are_never_sampled_are_suppressed_in_generation(
    write_run: WriteRun, output: Path, trained_tokenizer: Tokenizer
) -> None:
    export_hugging_face(write_run(validation={"temperature": 0.0}), output)
    unused = [*trained_tokenizer.never_sampled, *range(trained_tokenizer.vocab_size, 320)]
    assert read_json(output / "generation_config.json") == {
        "eos_token_id": trained_tokenizer.end_of_document,
        "pad_token_id": trained_tokenizer.id_of("<|pad|>"),
        "do_sample": False,
        "suppress_tokens": unused,
    }


@pytest.mark.parametrize(
    ("after_an_answer", "ends"),
    [
        ("<|im_end|>\n", ["<|end_of_document|>", "<|im_end|>"]),
        ("<|end_of_document|>", "<|end_of_document|>"),
        ("\n\n", "<|end_of_document|>"),
        ("<|eot|><|im_end|>", ["<|end_of_document|>", "<|eot|>"]),
    ],
)
def test_generation_ends_where_the_chat_template_ends_an_answer_as_in_savant_chat(
    after_an_answer: str, ends: str | list[str], write_run: WriteRun, output: Path, trained_tokenizer: Tokenizer
) -> None:
    inner = tokenizers.Tokenizer.from_str(trained_tokenizer.to_json())
    inner.add_special_tokens(["<|im_end|>", "<|eot|>"])
    written = f"{{{{ message['role'] + ': ' + message['content'] + {after_an_answer!r} }}}}"
    files = {"chat_template.jinja": f"{{% for message in messages %}}{written}{{% endfor %}}"}
    export_hugging_face(write_run(tokenizer_json=inner.to_str(), files=files), output)
    ids = read_json(output / "generation_config.json")["eos_token_id"]
    names = [inner.id_to_token(number) for number in ids] if isinstance(ids, list) else inner.id_to_token(ids)
    assert names == ends


def test_generation_samples_as_the_run_does(write_run: WriteRun, output: Path) -> None:
    export_hugging_face(write_run(validation={"temperature": 0.7}), output)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    assert sampling.items() <= read_json(output / "generation_config.json").items()


@pytest.mark.parametrize("adds", [True, False])
def test_the_tokenizer_adds_what_a_prompt_begins_with_and_not_what_ends_a_document(
    adds: bool, write_run: WriteRun, output: Path
) -> None:
    tokenizer_json = (FOLDER / "tokenizer.json").read_text()
    export_hugging_face(write_run(tokenizer_json=tokenizer_json, data={"add_special_tokens": adds}), output)
    exported = Tokenizer.load(output)
    assert exported.prefix == ((CLS,) if adds else ()) and exported.end_of_document == SEP
    assert exported.encode("the cat") == Tokenizer.load(FOLDER).encode("the cat")
    names = read_json(output / "tokenizer_config.json")
    assert (names.get("bos_token"), names["eos_token"], names["pad_token"]) == (
        "[CLS]" if adds else None,
        "[SEP]",
        "<pad>",
    )


def test_a_template_that_is_not_used_is_not_exported(write_run: WriteRun, output: Path) -> None:
    settings = read_json(FOLDER / "tokenizer.json")
    text = {"Sequence": {"id": "A", "type_id": 0}}
    settings["post_processor"]["single"] = [text, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, text]
    export_hugging_face(
        write_run(tokenizer_json=json.dumps(settings), data={"add_special_tokens": False, "end_of_document": "[SEP]"}),
        output,
    )
    exported = Tokenizer.load(output)
    assert not exported.adds_special_tokens and exported.end_of_document == SEP


def test_an_ordinary_token_that_ends_documents_stays_an_ordinary_token(
    write_run: WriteRun, output: Path, trained_tokenizer: Tokenizer
) -> None:
    export_hugging_face(write_run(data={"end_of_document": "!"}), output)
    assert "eos_token" not in read_json(output / "tokenizer_config.json")
    assert read_json(output / "generation_config.json")["eos_token_id"] == trained_tokenizer.id_of("!")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_and_nothing_is_left(
    write_run: WriteRun, output: Path
) -> None:
    with pytest.raises(CheckpointError, match="tokenizer has 284 ids, its model only 280"):
        export_hugging_face(write_run(model={"vocab_size": 280}), output)
    assert not output.parent.exists()


def test_an_existing_output_is_never_overwritten(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SettingsError, match="exists already"):
        export_hugging_face(write_run(), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_link_to_nothing_is_not_overwritten(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to("nothing")
    with pytest.raises(SettingsError, match="exists already"):
        export_hugging_face(write_run(), tmp_path / "mine")
    assert (tmp_path / "mine").is_symlink()


def test_an_unfinished_folder_of_a_process_with_the_same_number_is_left_alone(
    write_run: WriteRun, output: Path
) -> None:
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")  # processes in containers have the same numbers
    unfinished.mkdir(parents=True)
    export_hugging_face(write_run(), output)
    assert unfinished.is_dir() and output.is_dir()


def test_a_model_whose_tokenizer_cannot_encode_the_logic_suite_is_exported_without_it(
    write_run: WriteRun, output: Path
) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0, "C": 1, "</s>": 2}))  # has no unknown token
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    run = write_run(tokenizer_json=words.to_str(), validation={"prompt": "A C", "logic_problems": 0})
    assert main(["export", str(run), "--format", "hf", "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == FILES - {"lm_eval"}
    card = (output / "README.md").read_text()
    assert 'inputs = tokenizer("A C", return' in card and "lm_eval" not in card


def test_all_files_have_the_permissions_of_new_files(write_run: WriteRun, output: Path) -> None:
    umask = os.umask(0o022)
    try:
        export_hugging_face(write_run(), output)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*") if path.is_file()} == {0o644}


def test_a_full_disk_leaves_nothing(write_run: WriteRun, output: Path) -> None:
    run = write_run()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # of the files, only the weights are larger
    try:
        with pytest.raises(SavantError, match="--output .*exported"):
            export_hugging_face(run, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(output.parent.iterdir()) == []


def test_a_file_of_the_original_is_exported_with_the_named_settings(output: Path, tmp_path: Path) -> None:
    path, tokenizer = trained(2).save(tmp_path), write_tokenizer(tmp_path / "tokenizer")
    settings = ["--data.tokenizer", str(tokenizer), "--model.n_heads", "2", "--model.n_loops", "5"]
    assert main(["export", str(path), "--format", "hf", "--output", str(output), *settings]) == 0
    config = read_json(output / "config.json")
    assert (config["hidden_size"], config["num_attention_heads"], config["num_loops"]) == (16, 2, 5)
    names = dict(UniversalTransformer(ModelConfig(dim=16, n_heads=2)).named_parameters())
    assert load_file(output / "model.safetensors").keys() == names.keys()
    card = (output / "README.md").read_text()
    assert "trained with the original script" in card and "up to step 1 |" in card
    assert not re.search("optimizer|learning rate|sequences of|steps of", card)  # the file does not contain them
