"""`savant evaluate`: the table per template, own problems, and the score at other numbers of loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from savant_ray.cli import main
from savant_ray.config import Config, dump_yaml
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.evaluation.from_checkpoint import by_depth, held_out_rows, load_model
from savant_ray.evaluation.held_out_loss import loss_sums
from savant_ray.evaluation.logic_suite import logic_suite
from savant_ray.model.flex import has_flex
from savant_ray.model.transformer import UniversalTransformer
from savant_ray.original.file import read_file
from savant_ray.training.checkpoint import read_checkpoint, read_settings, write_checkpoint
from savant_ray.training.state import new_state
from tests.data.albert_like import with_chat_template
from tests.training.tiny import CPU, MODEL, unmasked

TEXT = "Question: what is 1 + 2? The answer is 3.\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((json.dumps({"text": TEXT}) + "\n") * 3)
    config = Config.from_dict(
        {
            "model": MODEL | {"vocab_size": 300},
            "data": {"validation": str(held_out)},
            "training": {"precision": "fp32"},
            "validation": {"max_new_tokens": 2},
        }
    )
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": train_tokenizer(iter([TEXT] * 9), 300).to_json()}
    return write_checkpoint(tmp_path / "run", {**new_state(config, CPU).to_checkpoint(), "step": 3}, texts).parent


def test_the_model_of_a_checkpoint_comes_with_its_chat_template(run: Path, tmp_path: Path) -> None:
    assert load_model(run)[1].chat_template is None
    config = read_settings(run / "step_3")
    tokenizer = with_chat_template(tmp_path / "tokenizer")
    texts = {"config.yaml": dump_yaml(config), **tokenizer.files()}
    write_checkpoint(tmp_path / "chat", {**new_state(config, CPU).to_checkpoint(), "step": 3}, texts)
    template = load_model(tmp_path / "chat")[1].chat_template
    assert template is not None and template == tokenizer.chat_template


def test_a_model_has_the_average_of_the_weights_unless_raw_ones_are_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_checkpoint(run / "step_3")
    content["ema_state_dict"] = {name: weight + 1 for name, weight in content["model_state_dict"].items()}
    files = {name: (run / "step_3" / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    averaged = write_checkpoint(tmp_path / "averaged", content, files)
    for raw, key in ((False, "ema_state_dict"), (True, "model_state_dict")):
        model, _, _ = load_model(averaged, raw_weights=raw)
        assert all(torch.equal(weight, content[key][name]) for name, weight in model.state_dict().items())
        output = tmp_path / f"export {raw}"
        assert (
            main(
                ["export", str(averaged), "--format", "safetensors", "--output", str(output), *["--raw-weights"] * raw]
            )
            == 0
        )
        exported = load_file(output / "model.safetensors")
        assert all(torch.equal(weight, content[key][name]) for name, weight in exported.items())
    assert main(["export", str(averaged), "--format", "original", "--output", str(tmp_path / "step_3.pt")]) == 0
    assert "warning: the file holds the weights of the last step, not their average" in capsys.readouterr().err
    original = read_file(tmp_path / "step_3.pt")["model_state_dict"]
    assert all(torch.equal(weight, original[name]) for name, weight in content["model_state_dict"].items())
    scores = []
    for option in ([], ["--raw-weights"]):
        file = tmp_path / "scores.json"
        assert (
            main(["evaluate", str(averaged), *option, "--depths", "2", "--max-new-tokens", "1", "--json", str(file)])
            == 0
        )
        scores.append(json.loads(file.read_text())["depths"])
    assert scores[0][0]["loss"] != scores[1][0]["loss"]


def test_the_suite_is_scored_per_template_with_an_interval(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json", str(tmp_path / "scores.json")]) == 0
    printed = capsys.readouterr().out
    scored = json.loads((tmp_path / "scores.json").read_text())
    assert scored["n"] == 600 and scored["interval"][0] <= scored["score"] <= scored["interval"][1]
    assert {"sum", "difference", "product", "comparison", "word_problem", "two_step"} <= set(scored["templates"])
    assert all(name in printed for name in scored["templates"]) and "95 % interval" in printed
    assert len(scored["answers"]) == len(logic_suite()) and scored["answers"][0].keys() >= {
        "prompt",
        "expected",
        "text",
        "correct",
    }


def test_a_file_of_problems_replaces_the_suite(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "1 + 1 =", "answer": 2, "template": "sum [hard][/5] :cat:"}) + "\n")
    assert main(["evaluate", str(run), "--problems", str(own), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 1
    assert "sum [hard][/5] :cat:" in capsys.readouterr().out


def test_each_number_of_loops_has_its_own_score_loss_and_residual(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "1 + 1 =", "answer": 2}) + "\n")
    arguments = [
        "evaluate",
        str(run),
        "--problems",
        str(own),
        "--depths",
        "1,2,8",
        "--json",
        str(tmp_path / "depths.json"),
    ]
    assert main(arguments) == 0
    depths = json.loads((tmp_path / "depths.json").read_text())["depths"]
    assert [each["loops"] for each in depths] == [1, 2, 8] and len({each["loss"] for each in depths}) == 3
    assert all(each["residual"] > 0 and -1 <= each["cosine"] <= 1 for each in depths)
    assert "last loop changes" in capsys.readouterr().out
    assert main([*arguments[:5], "1,x"]) == 2


def write_diverged(run: Path, folder: Path, head: float) -> Path:
    """Write the checkpoint of the run with this number as all weights of the head."""
    content = read_checkpoint(run / "step_3")
    content["model_state_dict"]["head.weight"].fill_(head)
    texts = {name: (run / "step_3" / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    return write_checkpoint(folder / "diverged", content, texts)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_every_command_refuses_a_model_that_cannot_answer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: float
) -> None:
    diverged = str(write_diverged(run, tmp_path, number))
    for arguments in (
        ["generate", "--checkpoint", diverged, "--prompt", "1 + 1 ="],
        ["evaluate", diverged],
        ["evaluate", diverged, "--depths", "1,2"],
        ["export", diverged, "--output", str(tmp_path / "exported"), "--format", "hf"],
    ):
        assert main(arguments) == 4
        out, err = capsys.readouterr()
        assert "not finite (NaN or infinite)" in err and not out, arguments
    assert not (tmp_path / "exported").exists()


def test_a_loss_that_is_not_finite_is_null_in_the_file(run: Path, tmp_path: Path) -> None:
    diverged = write_diverged(run, tmp_path, head=3e38)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": 2}) + "\n")
    options = ["--problems", str(tmp_path / "own.jsonl"), "--depths", "2", "--json", str(tmp_path / "depths.json")]
    assert main(["evaluate", str(diverged), *options]) == 0
    (row,) = json.loads((tmp_path / "depths.json").read_text(), parse_constant=pytest.fail)["depths"]
    assert row["loss"] is None and row["score"] == 0


def test_the_loss_at_the_trained_depth_is_the_models(run: Path) -> None:
    (scored,) = by_depth(run, logic_suite()[:1], [2])
    state = torch.load(run / "step_3/step_3.pt", weights_only=True)
    config = Config.from_dict({"model": MODEL | {"vocab_size": 300}})
    model = UniversalTransformer(config.model)
    model.load_state_dict(state["model_state_dict"])
    tokenizer = train_tokenizer(iter([TEXT] * 9), 300)
    tokens = torch.tensor([[*tokenizer.encode(TEXT), tokenizer.end_of_document][: config.model.max_seq_len]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    assert scored["loss"] == pytest.approx(float(loss), rel=1e-5)


def held_out_of_many_lengths(folder: Path, **model: int) -> Config:
    """Return settings with 50 held-out documents of 1 to 391 tokens."""
    texts = ["a" * n for n in range(1, 401, 10)] + ["b"] * 10
    held_out = folder / "many.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shape = MODEL | {"vocab_size": 300, "max_seq_len": 300} | model
    return Config.from_dict({"model": shape, "data": {"validation": str(held_out)}})


def test_rows_for_the_loss_have_few_lengths_and_the_loss_of_the_documents(tmp_path: Path) -> None:
    config = held_out_of_many_lengths(tmp_path)
    rows = list(held_out_rows(config, train_tokenizer(iter([TEXT] * 9), 300)))
    assert {row.tokens_BT.shape[1] for row in rows} == {128, 256, 300}
    documents = [
        unmasked(row.tokens_BT[row.document_ids_BT >= 0][None], row.document_ids_BT[row.document_ids_BT >= 0][None])
        for row in rows
    ]
    assert len({document.tokens_BT.shape[1] for document in documents}) > 20
    model = UniversalTransformer(config.model)
    torch.testing.assert_close(loss_sums(model, rows), loss_sums(model, documents), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not has_flex(torch.device("cuda"), 64), reason="needs flex")
def test_a_gpu_compiles_attention_for_few_lengths(tmp_path: Path) -> None:
    config = held_out_of_many_lengths(tmp_path, dim=128)
    tokenizer = train_tokenizer(iter([TEXT] * 9), 300)
    rows = [unmasked(row.tokens_BT.cuda(), row.document_ids_BT.cuda()) for row in held_out_rows(config, tokenizer)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss_sums(UniversalTransformer(config.model).cuda(), rows)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6  # at most two masks of three lengths


def test_without_the_held_out_text_there_is_a_score_and_no_loss(run: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").unlink()
    (scored,) = by_depth(run, logic_suite()[:1], [1])
    assert scored["loss"] is None and scored["n"] == 1
