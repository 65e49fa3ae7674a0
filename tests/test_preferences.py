"""`chatglm train-reward`, `dpo` and `rl` on tiny models: what TRL computes, what is written, what loads it again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close, largest_difference, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import chatglm
from chatglm.cli import main
from chatglm.hub.modeling_chatglm import ChatGLMForSequenceClassification
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.preferences.settings import DpoSettings, RewardSettings, RlSettings
from chatglm.training.methods import load_finetuned

pytest.importorskip("trl", reason="the loops are TRL's: install the extra 'preferences'")
pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")

from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, pad

from chatglm.preferences.dpo import dpo
from chatglm.preferences.reward import RewardModel, load_reward_model, save_reward_model, train_reward
from chatglm.preferences.rl import reward_function, rl

pytestmark = [
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # PEFT knows no packed layers of ours.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

PAIRS = [
    ("你好", "你好，世界！", "走开。"),
    ("今天天气怎么样？", "今天天气真好。", "不知道"),
    ("Hello", "Hello world, how are you today?", "The dog."),
    ("Who jumps?", "The quick brown fox.", "No."),
]
QUESTION = [{"role": "user", "content": "今天天气怎么样？"}]
CONVERSATIONS = [[*QUESTION, {"role": "assistant", "content": text}] for text in ("今天天气真好。", "不")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(file)


def settings(kind: type, model: Path | str, data: str, output: Path, **changes):
    return kind(
        model=str(model), data=(data,), output=str(output), device="cpu", lora_rank=2, accumulation=1,
        **{"learning_rate": 1e-2, "batch_size": 2, "max_steps": 3, "logging_steps": 1, "save_steps": 2} | changes,
    )  # fmt: skip


def quietly(run, settings, **options):
    return run(settings, progress=False, say=lambda line: None, **options)


def all_numbers_are_finite(outcome) -> bool:
    numbers = [value for entry in outcome.log for value in entry.values() if isinstance(value, float)]
    return all(map(math.isfinite, numbers))


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokenizer.encode_chat("今天天气")])).logits


# ---- log-probabilities as TRL computes them


@torch.no_grad()
def log_probability(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of an answer, computed alone and without padding."""
    ids = torch.tensor([prompt + answer])
    logs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logs.gather(1, torch.tensor(answer)[:, None]).sum()


def rows_of(tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of different lengths; one answer holds the token that begins answers."""
    rows = []
    for query, answer, _ in PAIRS:
        prompt = tokenizer.encode_chat(query)
        both = tokenizer.apply_chat_template(
            [{"role": "user", "content": query}, {"role": "assistant", "content": answer}], return_dict=False
        )
        rows.append((prompt, both[len(prompt) :]))
    rows.append((rows[0][0], [*rows[0][1][:3], tokenizer.sop_token_id, *rows[0][1][3:]]))
    return rows


@pytest.fixture(scope="module")
def small(family, tokenizer):
    """A model for this vocabulary, before and after TRL has put its output layer in."""
    from vocabularies import vocabulary_config

    plain, fused = (tiny_model(family, **vocabulary_config(tokenizer)) for _ in range(2))
    add_fused_lm_head(fused)
    return plain, fused


def test_dpo_sees_the_log_probabilities_of_single_rows(small, tokenizer):
    plain, fused = small
    rows = rows_of(tokenizer)
    examples = [
        {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[:2]} for prompt, answer in rows
    ]
    batch = DataCollatorForPreference(tokenizer.pad_token_id)(examples)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with torch.no_grad():
        found = fused(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
    alone = [log_probability(plain, prompt, answer) for prompt, answer in rows]
    alone += [log_probability(plain, prompt, answer[:2]) for prompt, answer in rows]
    assert_close(found, torch.stack(alone))


def test_reinforcement_learning_sees_the_log_probabilities_of_single_rows(small, tokenizer):
    plain, fused = small
    rows = rows_of(tokenizer)
    sides = {"left": [row[0] for row in rows], "right": [row[1] for row in rows]}
    ids = [
        pad([torch.tensor(row) for row in side], tokenizer.pad_token_id, where)
        for where, side in sides.items()
    ]
    masks = [
        pad([torch.ones(len(row), dtype=torch.long) for row in side], 0, where)
        for where, side in sides.items()
    ]
    input_ids, mask = torch.cat(ids, 1), torch.cat(masks, 1)
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, : ids[0].shape[1]] = -100
    with torch.no_grad():
        found = fused(
            input_ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
        ).log_probs.sum(-1)
    assert_close(found, torch.stack([log_probability(plain, *row) for row in rows]))


# ---- reward models


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reward_model_learns_and_loads_with_the_auto_class(tiny_folder, data, tmp_path, method):
    run = settings(
        RewardSettings, tiny_folder, data, tmp_path / "out", eval_data=(data,), method=method, max_steps=8
    )
    outcome = quietly(train_reward, run)
    assert all_numbers_are_finite(outcome)
    (_, first), *_, (_, last) = outcome.curve("eval_loss")
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last < first
    assert outcome.measured["pairs"] == len(PAIRS)
    model = AutoModelForSequenceClassification.from_pretrained(run.output, dtype=torch.float32)
    assert type(model) is ChatGLMForSequenceClassification
    assert model.num_labels == 1
    scores = RewardModel(model, ChatGLMTokenizer.from_pretrained(run.output)).scores(CONVERSATIONS)
    assert scores == load_reward_model(run.output).scores(CONVERSATIONS)
    assert scores[0] != scores[1]


def test_a_reward_model_keeps_the_dtype_of_its_base(tiny_v2_folder, data, tmp_path):
    quietly(train_reward, settings(RewardSettings, tiny_v2_folder, data, tmp_path / "out", dtype="bfloat16"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.fixture
def scorer(tiny_folder) -> RewardModel:
    """A reward model with random weights."""
    model = ChatGLMForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.classifier_head.weight)
    return RewardModel(model, ChatGLMTokenizer.from_pretrained(tiny_folder))


def test_the_form_of_the_fork_is_a_transformer_and_a_head_without_bias(scorer, tmp_path):
    save_reward_model(scorer.model, scorer.tokenizer, tmp_path / "head", "value-head")
    state = torch.load(tmp_path / "head" / "pytorch_model.bin", weights_only=True)
    assert state.pop("v_head.weight").shape == (1, scorer.model.config.hidden_size)
    assert state.keys() == {name for name in scorer.model.state_dict() if name.startswith("transformer.")}


def test_both_forms_give_the_same_scores(scorer, tmp_path):
    for form in ("classifier", "value-head"):
        save_reward_model(scorer.model, scorer.tokenizer, tmp_path / form, form)
        assert load_reward_model(tmp_path / form).scores(CONVERSATIONS) == pytest.approx(
            scorer.scores(CONVERSATIONS), abs=1e-5
        )


@torch.no_grad()
def test_the_score_is_that_of_the_last_token_whatever_is_beside_it(scorer):
    head = scorer.model.classifier_head.weight[0]
    for messages, score in zip(CONVERSATIONS, scorer.scores(CONVERSATIONS), strict=True):
        ids = scorer.tokenizer.apply_chat_template(messages, return_dict=False)
        hidden = scorer.model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
        assert score == pytest.approx((hidden @ head).item(), abs=1e-4)


def test_an_answer_that_was_broken_off_is_scored_without_an_end(scorer):
    ends = {scorer.tokenizer.eos_token_id}
    score = reward_function(scorer, ends)
    answers = [messages[1:] for messages in CONVERSATIONS]
    broken, whole = (
        score([QUESTION] * 2, answers, completion_ids=[[5, 6, last]] * 2)
        for last in (7, scorer.tokenizer.eos_token_id)
    )
    assert whole == scorer.scores(CONVERSATIONS)
    assert broken == scorer.scores(CONVERSATIONS, [False, False])
    assert broken != whole


def test_scores_that_are_no_numbers_are_told(scorer):
    torch.nn.init.constant_(scorer.model.classifier_head.weight, math.nan)
    with pytest.raises(ValueError, match="a score that is no number"):
        scorer.scores(CONVERSATIONS)


def test_a_folder_without_a_reward_model_is_told_before_it_is_loaded(tiny_v2_folder, data, tmp_path):
    for folder, message in (
        (tiny_v2_folder, "holds no reward model"),
        (tmp_path / "none", "There is no folder"),
    ):
        run = settings(
            RlSettings, tiny_v2_folder, data, tmp_path / "out", reward_model=str(folder), generations=2
        )
        with pytest.raises((OSError, ValueError), match=message):
            quietly(rl, run)
    assert not (tmp_path / "out").exists()


# ---- DPO


def test_dpo_writes_an_adapter_and_compares_with_the_model_without_it(tiny_folder, data, tmp_path):
    run = settings(DpoSettings, tiny_folder, data, tmp_path / "out", eval_data=(data,), max_steps=6)
    outcome = quietly(dpo, run)
    assert all_numbers_are_finite(outcome)
    assert outcome.curve("eval_rewards/chosen")[0] == (0, pytest.approx(0, abs=1e-6))
    margins = [value for _, value in outcome.curve("eval_rewards/margins")]
    assert margins[-1] > margins[0]
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".query_key_value.lora_" in name for name in names)  # and no copy for the reference
    before, after = logits_of(*chatglm.load(tiny_folder, "cpu")), logits_of(*load_finetuned(run.output))
    assert largest_difference(before, after) > 1e-4


def test_dpo_learns_on_a_packed_base(tiny_v2_folder, data, tmp_path):
    run = settings(DpoSettings, tiny_v2_folder, data, tmp_path / "out", quantize=4)
    assert all_numbers_are_finite(quietly(dpo, run))


def test_a_packed_output_layer_is_refused(tiny_v2_folder, data, tmp_path):
    main(["convert", str(tiny_v2_folder), str(tmp_path / "qe"), "--quantize", "4", "--quantize-embeddings"])
    with pytest.raises(ValueError, match=r"The output layer of .* is packed"):
        quietly(dpo, settings(DpoSettings, tmp_path / "qe", data, tmp_path / "out"))


# ---- reinforcement learning


@pytest.fixture
def reward_folder(scorer, tmp_path) -> str:
    save_reward_model(scorer.model, scorer.tokenizer, tmp_path / "reward", "value-head")
    return str(tmp_path / "reward")


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_reinforcement_learning_writes_an_adapter_and_its_curves(
    tiny_folder, data, reward_folder, tmp_path, algorithm
):
    run = settings(
        RlSettings, tiny_folder, data, tmp_path / "out", reward_model=reward_folder, eval_data=(data,),
        algorithm=algorithm, generations=2, batch_size=4, max_new_tokens=6,
    )  # fmt: skip
    outcome = quietly(rl, run)
    assert all_numbers_are_finite(outcome)
    assert outcome.curve("kl")[0] == (1, pytest.approx(0, abs=1e-6))
    for name in ("reward", "kl", "completions/mean_length", "eval_reward"):
        assert outcome.curve(name)[-1][0] == 3
    before, after = logits_of(*chatglm.load(tiny_folder, "cpu")), logits_of(*load_finetuned(run.output))
    assert largest_difference(before, after) > 1e-5
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"TRL's {algorithm.upper()}Trainer" in text


def test_answers_of_a_step_must_make_whole_groups(monkeypatch):
    run = RlSettings(data=("a",), output="b", reward_model="c", batch_size=3, accumulation=2, generations=4)
    with pytest.raises(ValueError, match="must be a multiple of generations, 4"):
        run.check()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    run.check()


# ---- runs


@pytest.mark.parametrize(
    ("kind", "run"), [(RewardSettings, train_reward), (DpoSettings, dpo), (RlSettings, rl)]
)
def test_a_run_that_is_resumed_ends_as_one_that_was_not_stopped(
    tiny_v2_folder, data, reward_folder, tmp_path, kind, run
):
    more = (
        {"reward_model": reward_folder, "generations": 2, "max_new_tokens": 4} if kind is RlSettings else {}
    )
    asked = settings(kind, tiny_v2_folder, data, tmp_path / "whole", max_steps=4, **more)
    quietly(run, asked)
    stopped = replace(asked, output=str(tmp_path / "stopped"))
    quietly(run, stopped)
    for path in (tmp_path / "stopped").iterdir():  # as if it had died after step 2
        if path.name in ("checkpoint-4", "README.md"):
            path.rename(tmp_path / path.name)
    quietly(run, stopped, resume=True)
    (file,) = (tmp_path / "whole").glob("*model.safetensors")
    whole, resumed = load_file(file), load_file(tmp_path / "stopped" / file.name)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_output_tells_how_it_was_made(tiny_v2_folder, data, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: install the extra 'train'")
    said = []
    train_reward(
        settings(RewardSettings, tiny_v2_folder, data, tmp_path / "out", eval_data=(data,)),
        progress=False,
        say=said.append,
    )
    assert "training: 4 of 4 records used" in said[0]
    folder = tmp_path / "out"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        f"chatglm train-reward {tiny_v2_folder} --output {folder} --data {data}",
        "TRL's RewardTrainer",
        "4 of 4 records used",
        "in the right order, %",
        "![curves by step](curves.png)",
        "## Licence",
    ):
        assert part in text


def test_weights_are_not_shared_out(tiny_v2_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ValueError, match="chatglm dpo gives every GPU a copy of the model; start it with accel"
    ):
        quietly(dpo, settings(DpoSettings, tiny_v2_folder, data, tmp_path / "out"))


def test_the_loss_of_the_better_answers_may_be_added(tiny_v2_folder, data, tmp_path):
    plain = settings(DpoSettings, tiny_v2_folder, data, tmp_path / "plain", batch_size=4, max_steps=1)
    both = replace(plain, output=str(tmp_path / "both"), sft_weight=0.5)
    alone, summed = (quietly(dpo, run).curve("loss")[0][1] for run in (plain, both))
    assert alone == pytest.approx(math.log(2), abs=1e-6)
    assert summed > alone + 0.5  # half of some nats per token, of random weights


def test_no_report_is_sent_to_anybody(tiny_v2_folder, data, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base

    monkeypatch.setattr(base, "send_telemetry", lambda *args, **kwargs: pytest.fail("TRL reports its use"))
    monkeypatch.delenv("CI", raising=False)
    quietly(train_reward, settings(RewardSettings, tiny_v2_folder, data, tmp_path / "out", max_steps=1))


def test_a_loss_that_is_no_number_ends_the_run(tiny_v2_folder, data, tmp_path):
    run = settings(
        RewardSettings, tiny_v2_folder, data, tmp_path / "out", method="full", learning_rate=1e39, max_steps=9
    )
    with pytest.raises(ValueError, match="The loss became"):
        quietly(train_reward, replace(run, scheduler="constant"))


def test_gradient_checkpointing_learns_the_same(tiny_v2_folder, data, tmp_path):
    plain = settings(DpoSettings, tiny_v2_folder, data, tmp_path / "plain")
    spared = replace(plain, output=str(tmp_path / "spared"), gradient_checkpointing=True)
    losses = [[loss for _, loss in quietly(dpo, run).curve("loss")] for run in (plain, spared)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_commands_follow_one_another(tiny_v2_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--data",
        data,
        "--batch-size",
        "2",
        "--accumulation",
        "2",
        "--max-steps",
        "1",
        "--device",
        "cpu",
    ]
    model = str(tiny_v2_folder)
    assert main(["train-reward", model, *flags, "--eval-data", data, "--output", "reward"]) == 0
    assert "Held-out rows at the end: pairs 4" in capsys.readouterr().out
    assert main(["dpo", model, *flags, "--output", "dpo"]) == 0
    assert f"convert {model} preferred --merge-adapter dpo" in capsys.readouterr().out
    rl_flags = [*flags, "--reward-model", "reward", "--generations", "2", "--max-new-tokens", "4"]
    assert main(["rl", model, *rl_flags, "--output", "rl"]) == 0
    assert main(["rl", model, *rl_flags, "--output", "rl"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["dpo", model, *flags, "--output", "other", "--chosen-column", "best"]) == 1
    assert "no column 'best'; it has prompt, chosen, rejected" in capsys.readouterr().err
