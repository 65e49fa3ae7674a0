"""chatglm bench: what it measures, the arithmetic of its figures, and how it tells them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers import tiny_model
from transformers import GenerationMixin
from vocabularies import vocabulary_config

import chatglm
from chatglm.cli import bench as command
from chatglm.cli import main
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.tools import bench as tool
from chatglm.tools import machine
from chatglm.tools.bench import Answers, Figure, Report, Stopwatch, Turn, bytes_per_token, figures, lengths
from chatglm.tools.chart import three_digits

SHORT = ["--device", "cpu", "--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "2"]


class Bar:
    """Counts, and shows nothing."""

    def __init__(self) -> None:
        self.n = 0

    def update(self) -> None:
        self.n += 1


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 20)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns the exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["bench", *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def report() -> Report:
    """Known numbers: two rounds, 100 tokens of prompt, answers of 11, of which 10 are decoded one by one."""
    about = {
        "model": "folder/tiny", "family": "chatglm2", "parameters": 1000, "layers": 2, "date": "2024-02-29",
        "machine": {
            "processor": "Z80", "vector extensions": [], "cores": 1, "logical cores": 1, "memory GB": 0.1,
            "system": "CP/M",
        },
        "versions": {"chatglm": "1", "torch": "2"},
        "device": "cpu", "threads": 1, "dtype": "float32", "packing": "none",
    }  # fmt: skip
    turns = {
        "greedy": [Turn(0.5, 1.0), Turn(0.25, 2.0)],
        "plain greedy": [Turn(1.0, 4.0), Turn(0.25, 2.0)],
        "sampled": [Turn(0.5, 5.0), Turn(0.5, 2.5)],
        "plain sampled": [Turn(0.5, 10.0), Turn(0.5, 10.0)],
    }
    return Report(
        about=about,
        prompt_tokens=100,
        new_tokens=11,
        sampling={"temperature": 0.8, "top_p": 0.7},
        load_time=3.0,
        bytes_per_token=10**9,
        memory={"resident": 2 * 10**9},
        bandwidth=[40e9, 60e9, 40e9],
        turns=turns,
        same_tokens=True,
    )


# ---- figures


def test_the_figures_are_computed_from_the_turns(report: Report):
    values = {figure.name: (figure.unit, figure.values) for figure in figures(report)}
    assert values == {
        "load time": ("s", (3.0,)),
        "prefill": ("tokens/s", (200.0, 400.0)),
        "time to first token": ("s", (0.5, 0.25)),
        "decode, likeliest token": ("tokens/s", (10.0, 5.0)),
        "decode, temperature 0.8, top-p 0.7": ("tokens/s", (2.0, 4.0)),
        "read by a decoded token": ("GB", (1.0,)),
        "memory bandwidth": ("GB/s", (40.0, 60.0, 40.0)),
        "share of it in decoding": ("%", (20.0, 10.0)),  # 10 and 5 GB a second of 50
        "peak memory, resident": ("GB", (2.0,)),
    }


def test_ratios_compare_the_turns_of_a_round_and_more_is_faster(report: Report):
    ratios = {figure.name: figure.times_as_fast for figure in figures(report) if figure.plain}
    assert ratios == {
        "prefill": (2.0, 1.0),
        "time to first token": (2.0, 1.0),
        "decode, likeliest token": (4.0, 1.0),
        "decode, temperature 0.8, top-p 0.7": (2.0, 4.0),
    }


def test_a_figure_is_a_median_with_its_range():
    facts = Figure("prefill", "tokens/s", (3.0, 1.0, 8.0), (1.0, 1.0, 2.0)).as_dict()
    assert {name: facts[name] for name in ("median", "lowest", "highest")} == {
        "median": 3.0,
        "lowest": 1.0,
        "highest": 8.0,
    }
    assert facts["times_as_fast"]["values"] == [3.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (14, "14.0"), (99.96, "100"), (123.4, "123"), (5742.4, "5,742")],
)
def test_numbers_have_three_digits_or_are_whole(value: float, text: str):
    assert three_digits(value) == text


# ---- turns


def model_for(tokenizer) -> ChatGLMForConditionalGeneration:
    return tiny_model(tokenizer.family, **vocabulary_config(tokenizer))


def test_the_time_to_the_first_token_counts_from_the_start_and_the_rest_from_there(tokenizer):
    ticks = iter([10.0, 13.0, 14.0, 16.0])  # start, and three tokens
    bar = Bar()
    answers = Answers(model_for(tokenizer), tokenizer, bar, clock=lambda: next(ticks))
    turn, tokens = answers.turn("greedy", tool.prompt_ids(tokenizer, 8), 3)
    assert turn == Turn(first=3.0, rest=3.0)
    assert len(tokens) == bar.n == 3


def test_a_stopwatch_passes_over_the_prompt():
    watch = Stopwatch(iter([1.0, 2.0]).__next__, Bar())
    for value in (torch.tensor([[5, 6, 7]]), torch.tensor([8]), torch.tensor([9])):
        watch.put(value)
    assert (watch.tokens, watch.times) == ([8, 9], [1.0, 2.0])


def test_an_answer_has_its_full_length_though_the_model_would_end_it(tokenizer):
    model = model_for(tokenizer)
    ids = tool.prompt_ids(tokenizer, 8)
    answers = Answers(model, tokenizer, Bar())
    _, tokens = answers.turn("greedy", ids, 5)
    model.generation_config.eos_token_id = tokens[0]
    arguments = model._generation_arguments(tokenizer, 8, do_sample=False, max_new_tokens=5)
    assert model.generate(torch.tensor([ids]), **arguments).shape[1] == 9  # ended at once
    for loop in ("greedy", "plain greedy", "sampled", "plain sampled"):
        assert len(answers.turn(loop, ids, 5)[1]) == 5


def test_a_sampled_turn_has_the_settings_of_the_chat(tokenizer, monkeypatch: pytest.MonkeyPatch):
    model, asked = model_for(tokenizer), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or generate(**options))
    answers = Answers(model, tokenizer, Bar())
    for loop in ("greedy", "sampled"):
        answers.turn(loop, tool.prompt_ids(tokenizer, 8), 2)
    chat = model._generation_arguments(tokenizer, 8, max_new_tokens=2)
    assert asked[0]["do_sample"] is False
    for name in ("do_sample", "temperature", "top_p"):
        assert asked[1][name] == chat[name]
    assert tool.sampling_settings(model) == {name: chat[name] for name in ("temperature", "top_p")}


@pytest.mark.parametrize("length", [4, 5, 60, 500])
def test_a_prompt_has_the_length_and_the_special_tokens_of_a_chat(tokenizer, length: int):
    ids = tool.prompt_ids(tokenizer, length)
    assert len(ids) == length
    special = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    assert (ids[-2:] if tokenizer.family == "chatglm" else ids[:2]) == special
    assert not set(special) & set(ids[2:-2])


@pytest.mark.parametrize(
    ("context", "asked", "given"),
    [
        (2048, (None, None), (512, 128)),
        (32768, (None, None), (512, 128)),
        (256, (None, None), (64, 16)),
        (256, (200, 56), (200, 56)),
    ],
    ids=str,
)
def test_lengths_suit_the_context(context: int, asked: tuple, given: tuple):
    assert lengths(context, *asked) == given


# ---- the loop it is compared with


def test_compare_runs_the_loop_of_transformers_turn_about(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def noting(name: str, sample: Callable) -> Callable:
        return lambda *args, **kwargs: calls.append(name) or sample(*args, **kwargs)

    for name, cls in (("ours", ChatGLMForConditionalGeneration), ("plain", GenerationMixin)):
        monkeypatch.setattr(cls, "_sample", noting(name, cls._sample))
    monkeypatch.setattr(tool.PlainModel, "_sample", GenerationMixin._sample)
    options = {"device": "cpu", "prompt_tokens": 8, "new_tokens": 3, "progress": False}
    report = tool.bench(tiny_folder, rounds=2, compare=True, **options)
    greedy_and_sampled = ["ours", "plain"] * 2
    assert calls == greedy_and_sampled + greedy_and_sampled + greedy_and_sampled[::-1]  # tried, two rounds
    assert report.same_tokens is True
    assert {loop: len(turns) for loop, turns in report.turns.items()} == dict.fromkeys(
        ["greedy", "plain greedy", "sampled", "plain sampled"], 2
    )
    calls.clear()
    report = tool.bench(tiny_folder, rounds=1, **options)
    assert set(calls) == {"ours"}
    assert report.same_tokens is None


def test_a_model_has_its_own_loop_again_after_an_error(shared_model):
    own = type(shared_model)
    with pytest.raises(KeyError), tool.the_loop_of_transformers(shared_model):
        assert type(shared_model)._sample is GenerationMixin._sample
        raise KeyError
    assert type(shared_model) is own


def test_different_tokens_are_told(report: Report):
    assert "gave the same tokens." in command.as_text(report.as_dict())
    different = command.as_text(replace(report, same_tokens=False).as_dict())
    assert "gave different tokens" in different


# ---- bytes


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_token_reads_all_weights_but_an_embedding_that_is_not_the_head(tiny_folder: Path, bits: int | None):
    model, _ = chatglm.load(tiny_folder, device="cpu", dtype="float16", quantize=bits)
    stored = {name: tensor.nbytes for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    embedding = [name for name in stored if name.endswith("word_embeddings.weight")]
    if model.config.family == "chatglm2":
        assert stored.pop(embedding[0])
    assert bytes_per_token(model) == sum(stored.values())


def test_a_packed_embedding_is_read_only_where_it_is_the_head(model):
    model.half().quantize(4, quantize_embeddings=True)
    config, head = model.config, model.get_output_embeddings()
    layers = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name)
    norm = sum(p.nbytes for name, p in model.named_parameters() if "final_layernorm" in name)
    assert head.weight.nbytes == config.vocab_size * config.hidden_size // 2
    assert bytes_per_token(model) == layers + norm + head.weight.nbytes + head.weight_scale.nbytes


def test_a_prefix_is_not_read_for_every_token(family):
    assert bytes_per_token(tiny_model(family, pre_seq_len=3)) == bytes_per_token(tiny_model(family))


# ---- the machine


def test_the_probe_tells_the_bytes_it_read_per_second(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 0.5, 1.0, 1.25])  # a sum in half a second, a product in a quarter
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.read_probe()() == (1 << 20) / 0.25


def test_the_probe_takes_no_more_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 20)
    ticks = iter([0.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.read_probe()() == 1 << 19


def test_the_peak_remembers_what_was_given_back():
    before = psutil.Process().memory_info().rss
    held = torch.ones(16 << 20)  # 64 MiB
    del held
    assert machine.peak_memory()["resident"] > before + (48 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_name_and_its_memory_are_told(tiny_folder: Path):
    options = {"prompt_tokens": 8, "new_tokens": 3, "rounds": 1, "compare": True, "progress": False}
    report = tool.bench(tiny_folder, device="cuda", **options)
    assert report.memory["cuda"] > report.bytes_per_token
    assert torch.cuda.get_device_name() in command.as_text(report.as_dict())


# ---- the command


def test_the_report_can_be_pasted_into_an_issue(report: Report):
    assert (
        command.as_text(report.as_dict())
        == """\
chatglm bench, 2024-02-29

- model: folder/tiny, chatglm2, 1,000 parameters, 2 layers
- machine: Z80, 1 logical cores, 0.1 GB, CP/M
- versions: chatglm 1, torch 2
- device: cpu, 1 thread
- dtype: float32
- packing: none
- measured: 2 rounds, prompts of 100 tokens, answers of 11

|                                    |          | median | lowest | highest | plain loop |       times as fast |
| ---------------------------------- | -------- | -----: | -----: | ------: | ---------: | ------------------: |
| load time                          | s        |   3.00 |        |         |            |                     |
| prefill                            | tokens/s |    300 |    200 |     400 |        250 | 1.50 (1.00 to 2.00) |
| time to first token                | s        |  0.375 |  0.250 |   0.500 |      0.625 | 1.50 (1.00 to 2.00) |
| decode, likeliest token            | tokens/s |   7.50 |   5.00 |    10.0 |       3.75 | 2.50 (1.00 to 4.00) |
| decode, temperature 0.8, top-p 0.7 | tokens/s |   3.00 |   2.00 |    4.00 |       1.00 | 3.00 (2.00 to 4.00) |
| read by a decoded token            | GB       |   1.00 |        |         |            |                     |
| memory bandwidth                   | GB/s     |   40.0 |   40.0 |    60.0 |            |                     |
| share of it in decoding            | %        |   15.0 |   10.0 |    20.0 |            |                     |
| peak memory, resident              | GB       |   2.00 |        |         |            |                     |

Taking the likeliest token, chatglm and the plain loop gave the same tokens."""
    )


def test_the_command_prints_a_table_and_writes_the_same_as_json(tiny_folder: Path, tmp_path: Path, run):
    file = tmp_path / "bench.json"
    status, out, error = run(str(tiny_folder), *SHORT, "--json", str(file))
    assert (status, error) == (0, "")
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert out == command.as_text(facts) + "\n"
    assert facts["model"] == str(tiny_folder)
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["device"], facts["dtype"], facts["packing"]) == ("cpu", "float32", "none")
    assert (facts["prompt_tokens"], facts["new_tokens"], facts["rounds"]) == (12, 4, 2)
    assert {figure["name"]: len(figure["values"]) for figure in facts["figures"]}["memory bandwidth"] == 3
    assert {loop: len(turns) for loop, turns in facts["turns"].items()} == {"greedy": 2, "sampled": 2}
    assert all(figure["lowest"] > 0 for figure in facts["figures"])


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        (["--quantize", "8"], "int8, a scale a row, plain kernels"),
        (["--quantize", "4", "--group-size", "32"], "int4, groups of 32, plain kernels"),
    ],
    ids=["int8", "int4"],
)
def test_the_report_tells_dtype_and_packing(tiny_v2_folder: Path, run, options: list[str], packing: str):
    options = [*options, "--dtype", "bfloat16", "--rounds", "1"]
    status, out, _ = run(str(tiny_v2_folder), *SHORT, *options)
    assert status == 0
    assert f"- dtype: bfloat16\n- packing: {packing}\n- measured: 1 round, prompts of 12" in out


def test_the_name_of_the_kernels_is_that_of_large_weights(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tool, "choose_path", lambda device_type: "torch")
    model.quantize(8)
    assert tool.packing(model).endswith("plain kernels")
    monkeypatch.setattr(tool, "WORTH_IT", 1 << 10)
    assert tool.packing(model).endswith("torch kernels")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_chart_is_drawn_in_the_format_of_its_ending(report: Report, tmp_path: Path, ending: str):
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    file = tmp_path / f"chart.{ending}"
    tool.draw(report, file)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert file.read_bytes().startswith(start)
    if ending == "svg":
        text = file.read_text()
        words = ["tiny, float32, Z80", "prefill of 100 tokens", "likeliest token, plain loop", "7.50", "40.0"]
        assert [word for word in words if word not in text] == []


def test_a_chart_without_matplotlib_is_refused_before_anything_is_loaded(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("chatglm.tools.chart.find_spec", lambda name: None)
    status, out, error = run("demo", "--chart", str(tmp_path / "chart.png"))
    assert (status, out) == (1, "")
    assert error == "chatglm: Charts need matplotlib, which is not installed; pip install matplotlib.\n"


def test_matplotlib_is_imported_for_charts_only(tiny_v2_folder: Path, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    assert run(str(tiny_v2_folder), *SHORT)[0] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--chart", "chart.pdf"], "chart.pdf is neither a .png nor a .svg file"),
        (["--chart", "missing/chart.png"], "missing/chart.png cannot be written"),
        (["--json", "missing/bench.json"], "missing/bench.json cannot be written"),
        (["--json", "."], ". cannot be written"),
        (["--group-size", "32"], "--group-size 32 is for packing to 4 bits; add --quantize 4"),
        (["--quantize", "8", "--group-size", "32"], "add --quantize 4"),
        (["--prompt-tokens", "3"], "A prompt of 3 and an answer of 32 tokens cannot be measured"),
        (["--new-tokens", "1"], "take 4 and 2 at least"),
        (["--prompt-tokens", "500", "--new-tokens", "13"], "make 513, but the model has a context of 512"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_ends_in_one_sentence(
    tiny_v2_folder: Path, tmp_path: Path, run, options: list[str], sentence: str, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, out, error = run(str(tiny_v2_folder), *options)
    assert (status, out) == (1, "")
    assert error.startswith("chatglm: ") and sentence in error
    assert error.count("\n") == 1


def test_help_does_without_torch():
    code = (
        "import sys; sys.argv[0] = 'chatglm'; from chatglm.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "bench", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "--compare" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    "option", [["--rounds", "0"], ["--new-tokens", "many"], ["--quantize", "5"]], ids=" ".join
)
def test_a_value_out_of_range_is_refused_by_name(run, option: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        run("demo", *option)
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_memory_that_is_used_up_ends_in_one_sentence(tiny_v2_folder: Path, run, monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(tool, "load", exhausted)
    status, _, error = run(str(tiny_v2_folder), *SHORT)
    assert status == 1
    assert "try --quantize 4, a smaller --prompt-tokens" in error
    assert error.count("\n") == 1


def test_the_bar_counts_every_token(tiny_v2_folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Shown(tool.tqdm):
        def __init__(self, **options) -> None:
            super().__init__(**options | {"disable": False, "file": sys.stderr})
            bars.append(self)

    bars = []
    monkeypatch.setattr(tool, "tqdm", Shown)
    options = {"device": "cpu", "prompt_tokens": 8, "new_tokens": 3, "rounds": 1, "compare": True}
    tool.bench(tiny_v2_folder, **options)
    assert bars[0].n == bars[0].total
