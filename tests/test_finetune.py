"""`chatglm finetune` on tiny models: what is written, what loads it again, resuming, settings, reports."""

from __future__ import annotations

import io
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close, largest_difference
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

import chatglm
from chatglm.cli import main
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.tools.convert import convert
from chatglm.training import trainer
from chatglm.training.finetune import finetune
from chatglm.training.methods import load_finetuned
from chatglm.training.scores import NAMES, score, score_one
from chatglm.training.settings import Settings, make_settings, read_yaml, to_yaml

pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")
pytestmark = [
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # PEFT knows no packed layers of ours.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

DIALOGUES = [
    ("你好", "你好，世界！"),
    ("今天天气怎么样？", "今天天气真好。"),
    ("Hello", "Hello world, how are you today?"),
    ("一加一等于几？", "等于二。"),
    ("Who jumps?", "The quick brown fox."),
    ("晚上睡不着应该怎么办？", "可以喝一杯热牛奶。"),
]
METHODS = ["lora", "ptuning", "full", "freeze"]
SMALL = {
    "lora": {"lora_rank": 2},
    "ptuning": {"pre_seq_len": 4, "learning_rate": 0.1},
    "full": {},
    "freeze": {"freeze_layers": 1},
}


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": q, "response": a}, ensure_ascii=False) for q, a in DIALOGUES]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def settings_for(folder: Path, data: str, tmp_path: Path) -> Settings:
    return Settings(
        model=str(folder), data=(data,), output=str(tmp_path / "out"), probe="none", device="cpu",
        learning_rate=1e-2, batch_size=2, accumulation=1, max_steps=6, logging_steps=1, save_steps=2,
    )  # fmt: skip


@pytest.fixture
def settings(tiny_v2_folder, data, tmp_path) -> Settings:
    """A run of six steps on a tiny ChatGLM2-6B."""
    return settings_for(tiny_v2_folder, data, tmp_path)


@pytest.fixture
def both(tiny_folder, data, tmp_path) -> Settings:
    """The same on one of either family."""
    return settings_for(tiny_folder, data, tmp_path)


def learned(outcome) -> bool:
    """Whether the loss of the watched data fell."""
    (_, first), *_, (_, last) = outcome.curve("eval_data_loss")
    return last < first


def quietly(settings: Settings, **options):
    return finetune(settings, progress=False, say=lambda line: None, **options)


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokenizer.encode_chat("今天天气")])).logits


def trained_state(output: str) -> dict[str, torch.Tensor]:
    folder = Path(output)
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    return load_file(folder / name)


def assert_same_weights(expected: str, actual: str) -> None:
    """What was trained is the same, bit for bit."""
    whole, other = trained_state(expected), trained_state(actual)
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        assert torch.equal(other[name], tensor), name


# ---- what each method writes


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_wrote_loads_and_answers_otherwise_than_before(both, method):
    assert learned(quietly(replace(both, method=method, eval_data=both.data, **SMALL[method])))
    before = logits_of(*chatglm.load(both.model, "cpu"))
    after = logits_of(*load_finetuned(both.output, device="cpu"))
    assert largest_difference(after, before) > 1e-4


def test_lora_loads_without_a_warning_about_what_users_cannot_change(both):
    quietly(replace(both, method="lora", **SMALL["lora"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        chatglm.load(both.model, "cpu", adapter=both.output)


@pytest.mark.parametrize("quantize", [None, 8])
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_an_adapter_is_chatted_with_and_served_as_it_is(both, method, quantize):
    pytest.importorskip("fastapi", reason="serving needs the extra 'server'")
    from chatglm.engine.request import Request
    from chatglm.server.model import load_model
    from chatglm.server.settings import Settings as ServerSettings

    quietly(replace(both, method=method, **SMALL[method]))
    loading = {"device": "cpu", "quantize": quantize, "adapter": both.output}
    model, tokenizer = chatglm.load(both.model, **loading)
    expected = logits_of(*load_finetuned(both.output, device="cpu", quantize=quantize))
    assert_close(logits_of(model, tokenizer), expected)
    answer, _ = model.chat(tokenizer, "今天天气", do_sample=False, max_length=40)

    served = load_model(both.model, ServerSettings(), **loading)
    try:
        prompt = tokenizer.encode_chat("今天天气")
        asked = served.engine.submit(Request(prompt, temperature=0, max_tokens=40 - len(prompt)))
        assert "".join(piece.text for piece in asked) == answer
        assert served.id == Path(both.output).name
    finally:
        served.engine.close()


def test_what_is_no_adapter_is_told(both, tmp_path):
    with pytest.raises(OSError, match="holds no adapter"):
        chatglm.load(both.model, "cpu", adapter=both.model)
    with pytest.raises(OSError, match="holds no adapter"):
        chatglm.load(both.model, "cpu", adapter=tmp_path / "nothing")


@pytest.mark.parametrize("quantize", [None, 8, 4])
def test_a_merged_adapter_gives_the_logits_of_the_adapter_beside_its_base(both, tmp_path, quantize):
    quietly(replace(both, quantize=quantize, lora_target=("query_key_value", "dense")))
    convert(both.model, tmp_path / "merged", merge_adapter=both.output, dtype="float32", progress=False)
    merged = logits_of(*chatglm.load(tmp_path / "merged", "cpu"))
    assert_close(logits_of(*load_finetuned(both.output, device="cpu")), merged)


def test_an_adapter_beside_a_packed_base_is_not_merged_into_it(settings):
    quietly(replace(settings, quantize=8))
    model, _ = load_finetuned(settings.output, device="cpu", quantize=8)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        model.merge_adapter()


def test_an_adapter_is_what_peft_writes_and_loads_under_the_old_names(both):
    from peft import PeftModel

    quietly(both)
    names = trained_state(both.output)
    assert all(
        name.startswith("base_model.model.transformer.")
        and name.endswith(("query_key_value.lora_A.weight", "query_key_value.lora_B.weight"))
        for name in names
    )
    model, tokenizer = load_finetuned(both.output, device="cpu")
    base = ChatGLMForConditionalGeneration.from_pretrained(both.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, both.output).eval()
    assert_close(logits_of(loaded, tokenizer), logits_of(model, tokenizer))


@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_a_prefix_loads_by_the_lines_of_the_published_guide(both, projection):
    quietly(replace(both, method="ptuning", pre_seq_len=4, prefix_projection=projection))
    state = torch.load(Path(both.output) / "pytorch_model.bin", weights_only=True)
    assert all(name.startswith("transformer.prefix_encoder.") for name in state)
    config = AutoConfig.from_pretrained(both.model, pre_seq_len=4, prefix_projection=projection)
    model = AutoModel.from_pretrained(both.model, config=config, dtype=torch.float32)
    encoder = {name.removeprefix("transformer.prefix_encoder."): tensor for name, tensor in state.items()}
    model.transformer.prefix_encoder.load_state_dict(encoder)
    ours, tokenizer = load_finetuned(both.output, device="cpu")
    assert_close(logits_of(model.eval(), tokenizer), logits_of(ours, tokenizer), atol=1e-5)


def test_a_prefix_beside_its_weights_gives_the_same_logits(both, tmp_path):
    quietly(replace(both, method="ptuning", pre_seq_len=4))
    convert(both.model, tmp_path / "both", prefix=both.output, progress=False)
    together = logits_of(*chatglm.load(tmp_path / "both", "cpu"))
    assert_close(together, logits_of(*load_finetuned(both.output, device="cpu")), atol=1e-5)


def test_freeze_changes_the_last_layers_alone(both):
    quietly(replace(both, method="freeze", freeze_layers=1))
    before = load_file(Path(both.model) / "model.safetensors")
    changed = [
        name for name, tensor in trained_state(both.output).items() if not torch.equal(tensor, before[name])
    ]
    assert changed
    assert all("layers.1." in name for name in changed)


def test_a_trained_checkpoint_keeps_the_dtype_of_its_base(settings):
    quietly(replace(settings, method="full"))
    assert {tensor.dtype for tensor in trained_state(settings.output).values()} == {torch.float16}


# ---- packed bases, precisions, memory


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_lora_and_prefix_learn_on_a_packed_base(both, method, bits):
    assert learned(quietly(replace(both, method=method, quantize=bits, eval_data=both.data, **SMALL[method])))
    model, tokenizer = load_finetuned(both.output, device="cpu", quantize=bits)
    assert torch.isfinite(logits_of(model, tokenizer)).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_bfloat16_with_float32_in_what_it_changes(settings, method):
    changes = {"method": method, "dtype": "bfloat16", "eval_data": settings.data}
    assert learned(quietly(replace(settings, **changes, **SMALL[method])))
    if method in ("lora", "ptuning"):
        assert {tensor.dtype for tensor in trained_state(settings.output).values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "ptuning", "full"])
def test_gradient_checkpointing_learns_the_same(settings, method, tmp_path):
    settings = replace(settings, method=method, **SMALL[method])
    plain = quietly(settings)
    other = quietly(replace(settings, gradient_checkpointing=True, output=str(tmp_path / "other")))
    for (_, expected), (_, loss) in zip(plain.curve("loss"), other.curve("loss"), strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)


def test_accumulated_batches_learn_what_one_large_batch_learns(settings, tmp_path):
    one = quietly(replace(settings, batch_size=6, max_steps=3))
    small = replace(settings, batch_size=2, accumulation=3, max_steps=3, output=str(tmp_path / "other"))
    for (_, expected), (_, loss) in zip(one.curve("loss"), quietly(small).curve("loss"), strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)


# ---- resuming


def interrupt(monkeypatch, after: int) -> None:
    """Lets the run die after so many batches, as if somebody had pressed Ctrl-C."""
    step, calls = trainer.FinetuneTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.FinetuneTrainer, "training_step", training_step)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(both, method, tmp_path, monkeypatch):
    both = replace(both, method=method, **SMALL[method])
    if method == "lora":
        both = replace(both, lora_dropout=0.2)  # random numbers must go on too
    whole = quietly(replace(both, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            quietly(both)
    half_written = Path(both.output) / "checkpoint-5"
    half_written.mkdir()
    resumed = quietly(both, resume=True)
    assert not half_written.exists()
    assert resumed.curve("loss") == whole.curve("loss")
    assert_same_weights(str(tmp_path / "whole"), both.output)


def test_a_run_that_resumes_between_two_epochs_has_looked_at_everything_and_ends_the_same(
    settings, tmp_path, monkeypatch
):
    watched = replace(
        settings, lora_dropout=0.2, eval_data=settings.data, predict_every_epoch=True, save_steps=3
    )
    whole = quietly(replace(watched, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            quietly(watched)
    resumed = quietly(watched, resume=True)
    assert resumed.resumed_at == 3  # of six steps, three an epoch
    for name in ("loss", "eval_data_loss"):
        assert resumed.curve(name) == whole.curve(name)
    assert list(resumed.scores) == ["epoch 1", "epoch 2"]
    assert resumed.scores == whole.scores
    assert_same_weights(str(tmp_path / "whole"), watched.output)


def test_a_run_is_resumed_with_the_same_settings_and_data_only(settings, data):
    quietly(settings)
    with pytest.raises(ValueError, match=r"learning_rate is 0.5, but the run .* was begun with 0.01"):
        quietly(replace(settings, learning_rate=0.5), resume=True)
    Path(data).write_text('{"prompt": "q", "response": "other words"}', encoding="utf-8")
    with pytest.raises(ValueError, match="data are not those"):
        quietly(settings, resume=True)


# ---- before anything is loaded


def test_an_output_that_is_not_empty_is_refused(settings):
    folder = Path(settings.output)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match="not empty"):
        quietly(settings)
    with pytest.raises(OSError, match="other things than a run of chatglm finetune"):
        quietly(settings, overwrite=True)
    with pytest.raises(OSError, match="no run to resume"):
        quietly(settings, resume=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_overwrite_replaces_an_earlier_run(settings):
    quietly(settings)
    quietly(replace(settings, method="ptuning", pre_seq_len=4), overwrite=True)
    assert not (Path(settings.output) / "adapter_config.json").exists()
    assert (Path(settings.output) / "pytorch_model.bin").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_column": "question"}, "no column 'question'; it has prompt, response"),
        ({"data": ()}, "data is missing"),
        ({"method": "qlora"}, "must be one of lora, ptuning, full, freeze"),
        ({"method": "full", "quantize": 4}, "packed weights cannot be trained"),
        ({"predict": True}, "give --eval-data"),
        ({"batch_size": 0}, "must be greater than 0"),
        ({"learning_rate": float("nan")}, "must be a number"),
        ({"epochs": True}, "must be a number"),
        ({"lora_dropout": 1.0}, "must be less than 1"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_the_model_is_looked_for(settings, monkeypatch, changes, message):
    monkeypatch.setattr("chatglm.training.finetune.find_checkpoint", lambda *args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message):
        quietly(replace(settings, **changes))
    assert not Path(settings.output).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "cannot be trained on a CPU"),
        ({"method": "freeze", "freeze_layers": 9}, "has 2 layers"),
        ({"lora_target": ("no_such_layer",)}, "no_such_layer"),
    ],
    ids=["float16", "freeze", "target"],
)
def test_what_this_model_or_machine_cannot_do_is_told_before_anything_is_written(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        quietly(replace(settings, **changes))
    assert not Path(settings.output).exists()


def test_packing_is_refused_for_chatglm_6b(settings, tiny_v1_folder):
    with pytest.raises(ValueError, match="packing is for ChatGLM2-6B"):
        quietly(replace(settings, model=str(tiny_v1_folder), packing=True))


def test_packing_trains_chatglm2_6b(settings):
    assert learned(quietly(replace(settings, packing=True, max_source_length=80, eval_data=settings.data)))


def test_packed_checkpoints_are_not_trained_in_full(settings, tmp_path):
    convert(settings.model, tmp_path / "packed", quantize=8, progress=False)
    with pytest.raises(ValueError, match="packed to 8 bits"):
        quietly(replace(settings, model=str(tmp_path / "packed"), method="full"))


def test_a_loss_that_is_no_number_ends_the_run(settings):
    with pytest.raises(ValueError, match="The loss became"):
        quietly(replace(settings, method="full", learning_rate=1e30, max_steps=20))


# ---- settings


def test_flags_win_over_the_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: ptuning\nlearning_rate: 1e-4\ndata: a.json\nepochs: 2\n", encoding="utf-8")
    settings = make_settings(file, {"method": "full"})
    assert (settings.method, settings.learning_rate, settings.data, settings.epochs) == (
        "full",
        1e-4,
        ("a.json",),
        2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate"),
        ("zzz: 1", "known are model"),
        ("- method", "holds no settings"),
        ("a: [", "no valid YAML"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
    ids=["near", "unknown", "list", "broken", "code"],
)
def test_a_yaml_file_that_makes_no_sense_is_told(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_yaml(file)


def test_settings_survive_the_yaml_file(settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(settings), encoding="utf-8")
    assert make_settings(file, {}) == settings


# ---- reports and scores


def test_the_output_tells_how_it_was_made(settings, data):
    with Path(data).open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "", "response": "x"}\n')
    watched = replace(settings, eval_data=(data,), probe=None, predict=True, eval_steps=3)
    outcome = quietly(watched)
    folder = Path(settings.output)
    assert [step for step, _ in outcome.curve("eval_probe_loss")] == [0, 3, 6]
    assert outcome.curve("eval_data_loss")[-1][1] < outcome.curve("eval_data_loss")[0][1]
    text = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        f"chatglm finetune {settings.model} --output {settings.output} --data {data}",
        "6 of 7 records used",
        f"1 left out: prompt is empty ({data}:7)",
        "| general questions |",
        "bleu-4",
        f"torch {torch.__version__}",
        "## Licence",
    ):
        assert part in text
    lines = (folder / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"labels", "predict"}] * 6


def test_the_losses_are_drawn(settings):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: install the extra 'train'")
    quietly(settings)
    assert (Path(settings.output) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_says_so_and_goes_on(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    finetune(settings, progress=False, say=said.append)
    assert "no picture of the loss without matplotlib" in said[-1]
    assert "loss.png" not in (Path(settings.output) / "README.md").read_text(encoding="utf-8")


def test_answers_are_scored_after_every_epoch(settings, data):
    outcome = quietly(
        replace(
            settings, max_steps=None, epochs=2.0, eval_data=(data,), predict_every_epoch=True, max_eval_rows=2
        )
    )
    assert list(outcome.scores) == ["epoch 1", "epoch 2"]


def test_the_command_trains_and_tells_what_comes_next(settings, data, capsys):
    flags = [
        "--output",
        settings.output,
        "--max-steps",
        "2",
        "--lora-rank",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    assert main(["finetune", settings.model, "--data", data, *flags, "--probe", "none"]) == 0
    assert f"--merge-adapter {settings.output}" in capsys.readouterr().out
    assert main(["finetune", settings.model, "--data", data, *flags, "--probe", "none"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--output", settings.output]) == 0


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_ask_answers_with_what_was_learned_without_converting(settings, data, method, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    rate = {"lora": 2e-2, "ptuning": 0.3}[method]
    more = {"max_steps": 60, "pre_seq_len": 8, "lora_rank": 8, "learning_rate": rate}
    assert learned(quietly(replace(settings, method=method, eval_data=(data,), save_steps=100, **more)))
    model, tokenizer = load_finetuned(settings.output, device="cpu")
    expected, _ = model.chat(tokenizer, "你好", do_sample=False, max_length=24)
    flags = f"--adapter {settings.output} --device cpu --temperature 0 --max-length 24 --json".split()
    capsys.readouterr()
    assert main(["ask", "你好", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == expected
    assert told["model"] == settings.model  # the one that the adapter was made for
    base, _ = chatglm.load(settings.model, "cpu")[0].chat(tokenizer, "你好", do_sample=False, max_length=24)
    assert base != expected


def test_an_adapter_that_does_not_fit_is_told_in_one_line(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    quietly(settings)
    assert main(["ask", "你好", "--model", "demo", "--adapter", settings.output]) == 1
    assert "was made for a model of other sizes" in capsys.readouterr().err
    assert main(["ask", "你好", "--adapter", str(tmp_path)]) == 1
    assert "holds no adapter (adapter_config.json) and no prefix" in capsys.readouterr().err


def test_the_command_tells_a_wrong_column_in_one_line(settings, data, capsys):
    flags = ["--output", settings.output, "--prompt-column", "frage"]
    assert main(["finetune", settings.model, "--data", data, *flags]) == 1
    assert "no column 'frage'; it has prompt, response" in capsys.readouterr().err


def test_right_answers_score_100_and_empty_ones_nothing():
    assert score_one("今天天气真好", "今天天气真好") == pytest.approx(dict.fromkeys(NAMES, 100.0))
    assert score_one("今天天气真好", " ") == dict.fromkeys(NAMES, 0.0)


def test_scores_are_the_published_formulas():
    # Words 我们 去 公园 玩 and 我们 去 公园 吧: three of four, two of three pairs, three in a row.
    scores = score(["我们去公园玩"], ["我们去公园吧"])
    assert scores["rouge-1"] == pytest.approx(75, abs=0.01)
    assert scores["rouge-2"] == pytest.approx(100 * 2 / 3, abs=0.01)
    assert scores["rouge-l"] == pytest.approx(75, abs=0.01)
    # Characters: five of six, four of five, three of four, two of three, and the same length.
    assert scores["bleu-4"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, abs=0.01)
    assert scores["exact"] == 0


def test_a_short_answer_is_smoothed_as_published():
    # One character of two is right and no pair: of n-grams that never match, each counts half of the one before.
    expected = 100 * (1 / 2 * 1 / 2 * 1 / 4 * 1 / 8) ** 0.25
    assert score_one("你好", "你们")["bleu-4"] == pytest.approx(expected, abs=0.01)


def test_answers_without_an_end_are_scored_too():
    assert score_one("今天天气真好" * 200, "天气今天好" * 200)["rouge-l"] > 0
