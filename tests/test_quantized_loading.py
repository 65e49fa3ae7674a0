"""Packing while loading, folders that are packed already, and what is refused of either."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHATGLM, CHATGLM2, logits, prompt, tiny_model
from safetensors.torch import load_file, save_file
from tiny import HUB_FILES
from transformers import AutoModel

import chatglm
from chatglm.hub.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
)
from chatglm.hub.quantization import (
    QUANTIZED_LAYERS,
    ChatGLMQuantizationConfig,
    Linear,
    QuantizedLinear,
    give_back,
)

ROOT = Path(__file__).resolve().parents[1]
PACKINGS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 in groups": {"bits": 4, "group_size": 32},
    "int8 with embedding": {"bits": 8, "quantize_embeddings": True},
    "int4 in groups with embedding": {"bits": 4, "group_size": 64, "quantize_embeddings": True},
}
LAYER = {  # one packed layer of each family
    CHATGLM: "transformer.layers.1.attention.dense",
    CHATGLM2: "transformer.encoder.layers.1.self_attention.dense",
}
load = ChatGLMForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint."""
    path = tmp_path_factory.mktemp(family) / "half"
    tiny_model(family).half().save_pretrained(path)
    return path


@pytest.fixture
def packed_folder(family: str, tmp_path: Path) -> Callable[..., Path]:
    """Makes a packed checkpoint, and changes the keys of its config.json and its tensors on the way."""

    def make(
        change: Callable[[dict], None] = lambda tensors: None, drop=(), packing=None, **keys: Any
    ) -> Path:
        model = tiny_model(family).half()
        if packing is not False:
            model.quantize(**(packing or {"bits": 4}))
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in drop} | keys
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def asked(**packing: Any) -> dict[str, Any]:
    return {"quant_method": "chatglm", **packing}


def assert_same_tensors(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, wanted = model.state_dict(), expected.state_dict()
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# ---- packing while loading


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_packing_while_loading_gives_the_integers_of_packing_in_half(folder, family, packing, dtype):
    expected = tiny_model(family).half().quantize(**packing)
    if dtype is not None:
        expected.to(dtype)
    model = load(folder, quantization_config=asked(**packing), **({"dtype": dtype} if dtype else {}))
    assert_same_tensors(model, expected)
    assert torch.equal(logits(model, prompt(family)), logits(expected, prompt(family)))


@pytest.mark.parametrize("kind", ["sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_of_every_kind_and_dtype_are_packed_in_their_own_dtype(family, kind, dtype, tmp_path):
    model = tiny_model(family).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if kind == "sharded safetensors" else "1GB")
    if "bin" in kind:
        (tmp_path / "model.safetensors").unlink()
        tensors = list(model.state_dict().items())
        half = len(tensors) // 2 if kind == "sharded bin" else len(tensors)
        names = (
            ["pytorch_model-1.bin", "pytorch_model-2.bin"] if half < len(tensors) else ["pytorch_model.bin"]
        )
        for name, part in zip(names, (tensors[:half], tensors[half:]), strict=False):
            torch.save(dict(part), tmp_path / name)
        index = {name: names[i >= half] for i, (name, _) in enumerate(tensors)} if len(names) > 1 else {}
        if index:
            (tmp_path / "pytorch_model.bin.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": index})
            )
    assert len(list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob("*.bin"))) >= (
        1 if kind == "bin" else 2
    )
    assert_same_tensors(load(tmp_path, quantization_config=asked(bits=4)), model.quantize(4))


def test_an_object_asks_for_the_same_as_a_dictionary(folder):
    packing = PACKINGS["int4 in groups with embedding"]
    model = load(folder, quantization_config=ChatGLMQuantizationConfig(**packing))
    assert_same_tensors(model, load(folder, quantization_config=asked(**packing)))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_a_device_map_changes_nothing_of_the_weights(folder, device_map):
    pytest.importorskip("accelerate")
    model = load(folder, quantization_config=asked(bits=8), device_map=device_map)
    assert_same_tensors(model.to("cpu"), load(folder, quantization_config=asked(bits=8)))


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_the_loaded_model_is_like_one_that_quantize_packed(folder, packing):
    expected = load(folder).quantize(**packing)
    model = load(folder, quantization_config=asked(**packing))
    assert model.config.to_dict() == expected.config.to_dict()
    assert vars(model.config).keys() == vars(expected.config).keys()
    assert vars(model).keys() == vars(expected).keys()
    assert model.all_tied_weights_keys == expected.all_tied_weights_keys
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, expected)]
    assert trainable[0] == trainable[1]


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_the_loaded_model_can_be_cast_and_moved(folder, packing):
    model = load(folder, quantization_config=asked(**packing))
    assert model.float().dtype == torch.float32
    assert model.half().to("cpu").dtype == torch.float16
    assert_same_tensors(model, load(folder).quantize(**packing))


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_the_loaded_model_saves_in_the_published_form_and_loads_equal(folder, packing, tmp_path):
    model = load(folder, quantization_config=asked(**packing))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["quantization_bit"] == packing["bits"]
    assert_same_tensors(load(tmp_path), model)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_packed_embedding_of_chatglm_6b_is_the_head_too(bits, tmp_path):
    tiny_model(CHATGLM).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["transformer.word_embeddings.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):  # published files hold the head too, ours do not
        model = load(tmp_path, quantization_config=asked(bits=bits, quantize_embeddings=True))
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.lm_head.weight_scale is model.get_input_embeddings().weight_scale
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("cls", [ChatGLMModel, ChatGLMForSequenceClassification])
def test_every_model_class_packs_while_loading(family, cls, tmp_path):
    model = tiny_model(family, cls).half()
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, quantization_config=asked(bits=8))
    assert [layer for layer in loaded.modules() if isinstance(layer, QuantizedLinear)]
    assert_same_tensors(loaded, model.quantize(8))


def test_a_prefix_is_trained_on_a_model_that_was_packed_while_loading(folder):
    model = load(folder, quantization_config=asked(bits=4), pre_seq_len=4)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"transformer.prefix_encoder.embedding.weight"}


# ---- folders that are packed already


def test_a_packed_folder_takes_a_quantization_config_that_says_the_same(packed_folder):
    folder = packed_folder(packing=PACKINGS["int4 in groups"])
    model = load(folder, quantization_config=asked(**PACKINGS["int4 in groups"]))
    assert_same_tensors(model, load(folder))


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_config_json_may_tell_the_packing_in_a_quantization_config(packed_folder, family, packing):
    published = ("quantization_bit", "quantization_group_size", "quantization_embeddings")
    folder = packed_folder(packing=packing, drop=published, quantization_config=asked(**packing))
    model = load(folder)
    assert model.config.quantization_bit == packing["bits"]
    assert not hasattr(model.config, "quantization_config")
    assert_same_tensors(model, tiny_model(family).half().quantize(**packing))


def test_packed_layers_of_a_folder_are_not_trainable(packed_folder):
    model = load(packed_folder())
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            assert not layer.weight.requires_grad
            assert not layer.weight_scale.requires_grad


@pytest.mark.parametrize("key", ["argument", "config.json"])
def test_a_packed_folder_and_another_packing_are_refused_together(packed_folder, key):
    keys = (
        {"drop": ["quantization_bit"], "quantization_config": asked(bits=4)} if key == "config.json" else {}
    )
    folder = packed_folder(**keys)
    words = r"\(4, None, False\), but quantization_config asks for \(8, None"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        warnings.filterwarnings("ignore", message=".*already has a `quantization_config`")  # of transformers
        load(folder, quantization_config=asked(bits=8))


# ---- without this package


REMOTE = """
import sys
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

first, second = sys.argv[1:]
get_class_from_dynamic_module("modeling_chatglm.ChatGLMModel", first)
assert "chatglm" not in AUTO_QUANTIZER_MAPPING, "importing has registered something"
asked = {"quant_method": "chatglm", "bits": 4}
models = [AutoModel.from_pretrained(folder, trust_remote_code=True, quantization_config=asked)
          for folder in (first, second, first)]
codes = {type(model).__module__ for model in models}
assert len(codes) == 2, codes  # each folder brings its own copy of the code
for model in models:
    layers = [layer for layer in model.modules() if type(layer).__name__ == "QuantizedLinear"]
    assert len(layers) == 4 * model.config.num_layers
    assert model.config.quantization_bit == 4
assert "chatglm" not in sys.modules
print("fine")
"""


def test_folders_pack_while_loading_where_this_package_is_not_installed(tiny_folder: Path, tmp_path: Path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        shutil.copytree(tiny_folder, folder)
        for name in HUB_FILES:
            shutil.copy(ROOT / name, folder)
        with (folder / "quantization.py").open("a") as file:
            file.write(f"\n# copy {number}\n")
    code = [sys.executable, "-W", "error::FutureWarning", "-c", REMOTE, *map(str, folders)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_auto_classes_take_the_quantization_config_too(tiny_folder: Path):
    model = AutoModel.from_pretrained(tiny_folder, quantization_config=asked(bits=8))
    assert model.config.quantization_bit == 8


# ---- chatglm.load


@pytest.mark.parametrize("group_size", [None, 32])
def test_load_packs_the_numbers_of_the_file_whatever_it_computes_in(tiny_folder: Path, group_size):
    model, _ = chatglm.load(tiny_folder, device="cpu", quantize=4, group_size=group_size)
    assert model.dtype == torch.float32
    assert_same_tensors(model, load(tiny_folder).quantize(4, group_size=group_size).float())


def test_load_holds_no_model_that_is_not_packed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("a whole float model was packed")

    monkeypatch.setattr(QuantizedLinear, "fill", refuse)
    model, _ = chatglm.load(tiny_folder, device="cpu", quantize=8)
    assert model.config.quantization_bit == 8


def test_load_refuses_groups_without_packing(tiny_folder: Path):
    with pytest.raises(ValueError, match="give quantize=4 too"):
        chatglm.load(tiny_folder, device="cpu", group_size=32)


# ---- what is refused


@pytest.mark.parametrize(
    ("packing", "words"),
    [
        ({"bits": 5}, "not 5"),
        ({"bits": 0}, "not 0"),
        ({"bits": 4, "group_size": 48}, "group_size is 48"),
        ({"bits": 8, "group_size": 32}, "group_size is 32 at 8 bits"),
        ({"bits": 4, "groupsize": 32}, "unknown key 'groupsize'"),
    ],
    ids=str,
)
def test_a_packing_that_does_not_exist_is_refused_before_a_file_is_opened(packing, words):
    with pytest.raises(ValueError, match=words):
        load("no such folder", quantization_config=asked(**packing))


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("while_loading", [False, True], ids=["in place", "while loading"])
def test_a_width_that_cannot_be_packed_is_refused_before_anything_is_changed(
    group_size, while_loading, tmp_path
):
    model = tiny_model(CHATGLM2, ffn_hidden_size=127)
    words = "127 columns cannot be packed" if group_size is None else "cannot be cut into groups of 128"
    with pytest.raises(ValueError, match=words):
        if while_loading:
            model.save_pretrained(tmp_path)
            load(tmp_path, quantization_config=asked(bits=4, group_size=group_size))
        else:
            model.quantize(4, group_size=group_size)
    assert not [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert not model.config.quantization_bit


def test_an_embedding_that_is_not_the_head_cannot_be_packed_with_it():
    model = tiny_model(CHATGLM, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="tie_word_embeddings is false"):
        model.quantize(4, quantize_embeddings=True)
    assert not model.config.quantization_bit


@pytest.mark.parametrize(("in_file", "in_config"), [(4, 8), (8, 4)])
def test_other_bits_in_the_file_than_in_the_config_are_named(packed_folder, in_file, in_config):
    folder = packed_folder(packing={"bits": in_file}, quantization_bit=in_config)
    with pytest.raises(
        ValueError, match=f"packed to {in_file} bits, but quantization_bit .* says {in_config}"
    ):
        load(folder)


@pytest.mark.parametrize("in_file", [None, 32], ids=["rows", "groups"])
def test_another_kind_of_scales_than_the_config_says_is_named(packed_folder, in_file):
    folder = packed_folder(
        packing={"bits": 4, "group_size": in_file}, quantization_group_size=None if in_file else 32
    )
    found, wanted = ("every group", "one scale a row") if in_file else ("one scale a row", "every group")
    with pytest.raises(ValueError, match=f"weight_scale .* {found}.* it is .*{wanted}"):
        load(folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_that_the_config_does_not_tell_of_are_refused(packed_folder, bits):
    folder = packed_folder(packing={"bits": bits}, quantization_bit=0)
    with pytest.raises(ValueError, match="set quantization_bit there"):
        load(folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_embedding_that_the_config_does_not_tell_of_is_refused(packed_folder, bits):
    folder = packed_folder(packing={"bits": bits, "quantize_embeddings": True}, quantization_embeddings=False)
    with pytest.raises(ValueError, match="set quantization_embeddings there"):
        load(folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_float_weights_that_the_config_calls_packed_are_refused(packed_folder, bits):
    folder = packed_folder(packing=False, quantization_bit=bits)
    with pytest.raises(ValueError, match=f"packed to {bits} bits; take quantization_bit out"):
        load(folder)


@pytest.mark.parametrize("quantization_config", [None, asked(bits=4)], ids=["plain", "packed while loading"])
def test_a_weight_of_another_shape_is_refused(packed_folder, family, quantization_config):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER[family]}.weight"
        tensors[name] = tensors[name][:-1].clone()

    folder = packed_folder(cut, packing=False)
    with pytest.raises(ValueError, match=rf"{LAYER[family]}.weight.* shape (is )?\(63, 64\)"):
        load(folder, quantization_config=quantization_config)


def test_a_norm_of_another_shape_is_refused_while_packing(packed_folder):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("final_layernorm.weight"))
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ValueError, match=r"final_layernorm.weight in .* has shape \(63,\)"):
        load(packed_folder(cut, packing=False), quantization_config=asked(bits=4))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_while_packing(packed_folder, family, broken):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER[family]}.weight"][3, 5] = broken

    with pytest.raises(ValueError, match=f"{LAYER[family]}.weight: .*not finite"):
        load(packed_folder(damage, packing=False), quantization_config=asked(bits=4))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_no_quantizer_writes_are_refused_by_name(packed_folder, family, value, group_size):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER[family]}.weight_scale"].view(-1)[3] = value

    folder = packed_folder(damage, packing={"bits": 4, "group_size": group_size})
    words = "is zero where the weight is not" if value == 0 else "holds NaN or infinity"
    with pytest.raises(ValueError, match=rf"{LAYER[family]}.weight_scale in .* {words}"):
        load(folder)


@pytest.mark.parametrize("packing", [PACKINGS["int8"], PACKINGS["int4 in groups"]], ids=str)
def test_a_scale_of_zero_is_right_for_numbers_that_are_all_zero(packed_folder, family, packing):
    def empty(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER[family]}.weight"][3] = 0
        tensors[f"{LAYER[family]}.weight_scale"][3] = 0

    model = load(packed_folder(empty, packing=packing))
    assert logits(model, prompt(family)).isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_an_input_on_another_device_than_the_packed_weight_is_told(bits):
    layer = QuantizedLinear.from_linear(torch.nn.Linear(8, 4), bits)
    with pytest.raises(ValueError, match="input is on meta, but the packed weight on cpu"):
        layer(torch.ones(1, 8, device="meta"))


# ---- memory


linux = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """A mebibyte of a mapped file, as weights of a checkpoint are."""
    save_file({"x": torch.arange(1 << 18, dtype=torch.int32)}, tmp_path / "x")
    tensor = load_file(tmp_path / "x")["x"]
    assert int(tensor.sum(dtype=torch.int64)) == (1 << 18) * ((1 << 18) - 1) // 2  # reads every page
    return tensor


def resident_pages(tensor: torch.Tensor) -> int:
    """Pages of a tensor that lie in the memory of this process."""
    page = 4096
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(tensor.data_ptr() // page * 8)
        return sum(entry >> 7 for entry in file.read(tensor.nbytes // page * 8)[7::8])


@linux
def test_pages_of_a_file_are_given_back_and_read_again(mapped):
    before = resident_pages(mapped)
    give_back(mapped)
    assert before > 200
    assert resident_pages(mapped) <= 2
    assert torch.equal(mapped, torch.arange(1 << 18, dtype=torch.int32))


@linux
def test_pages_that_were_written_are_kept(mapped):
    mapped[1000:1010] = -1
    give_back(mapped)
    assert mapped[1000:1010].eq(-1).all()


def test_memory_that_is_no_file_is_kept():
    tensor = torch.arange(1 << 18)
    give_back(tensor)
    assert torch.equal(tensor, torch.arange(1 << 18))


# ---- other libraries


@pytest.fixture
def wide_folder(family: str, tmp_path: Path) -> Path:
    """A bfloat16 checkpoint of a width that other libraries can pack."""
    sizes = {"hidden_size": 256, "num_layers": 1}
    sizes |= {"inner_hidden_size": 512} if family == CHATGLM else {"ffn_hidden_size": 512, "kv_channels": 64}
    tiny_model(family, **sizes).bfloat16().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def other_packings(library: str) -> list[Any]:
    """Configs of another library; the test is skipped where it is absent."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    import transformers

    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return [transformers.TorchAoConfig(Int8WeightOnlyConfig())]
    configs = [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}]
    return [transformers.BitsAndBytesConfig(**config) for config in configs]


@pytest.mark.filterwarnings("ignore")  # those libraries have their own
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_other_libraries_pack_the_layers_save_them_and_load_them_again(
    wide_folder, family, library, tmp_path
):
    expected = logits(load(wide_folder), prompt(family))
    for config in other_packings(library):
        model = load(wide_folder, quantization_config=config)
        layers = [layer for name, layer in model.named_modules() if name.endswith(QUANTIZED_LAYERS)]
        plain = (torch.nn.Linear, Linear), (torch.Tensor, torch.nn.Parameter)
        assert len(layers) == 4
        assert not [x for x in layers if type(x) in plain[0] and type(x.weight) in plain[1]]
        assert type(model.get_output_embeddings().weight) in plain[1]
        actual = logits(model, prompt(family))
        assert 0 < (actual - expected).float().norm() / expected.float().norm() < 0.5
        assert torch.equal(logits(model.prepack(), prompt(family)), actual)
        folder = tmp_path / type(config).__name__
        model.save_pretrained(folder)
        assert torch.equal(logits(load(folder), prompt(family)), actual)
        shutil.rmtree(folder)
