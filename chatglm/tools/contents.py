"""What can be read of a checkpoint folder, whole or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from chatglm.checkpoint import find_weights, read_config, read_index, read_weight_file, sizes_of
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.tools.report import sentence
from chatglm.weights.expected import HEAD, expected_shapes
from chatglm.weights.read import read_state
from chatglm.weights.tensors import State
from chatglm.weights.transform import HEADS, PREFIX


@dataclass
class Contents:
    """What can be read of a folder; the faults of its weight files are kept beside."""

    folder: Path
    faults: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> ChatGLMConfig | None:
        """None if config.json is not one of ours."""
        try:
            keys = read_config(self.folder)
            sizes_of(keys)
            return ChatGLMConfig.from_dict(keys)
        except Exception:  # check_config says what is wrong
            return None

    @property
    def lacks_config(self) -> bool:
        return not (self.folder / "config.json").is_file()

    @cached_property
    def index(self) -> Path | None:
        try:
            first = find_weights(self.folder)
        except OSError:
            return None
        return first if first.suffix == ".json" else None

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return read_index(self.index) if self.index else {}

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights that loading reads, whether they are there or not."""
        try:
            first = find_weights(self.folder)
            names = sorted(set(self.weight_map.values())) if self.index else [first.name]
        except (OSError, ValueError) as error:
            self.faults.append(str(error))
            return []
        return [self.folder / name for name in names]

    @cached_property
    def states(self) -> dict[str, State]:
        """The tensors of each file of weights that can be read, by the name of the file."""
        states = {}
        for path in self.files:
            try:
                read_weight_file(path)
                states[path.name] = read_state([path])
            except Exception as error:  # one damaged file does not hide the others
                self.faults.append(sentence(error))
        return states

    @cached_property
    def state(self) -> State:
        """All tensors; of those that two files hold, one."""
        return {name: tensor for state in self.states.values() for name, tensor in state.items()}

    @cached_property
    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model that chats."""
        assert self.config is not None
        return expected_shapes(self.config)

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the folder should hold."""
        assert self.config is not None
        shapes = self.model_shapes
        if self.is_classifier:
            labels = self.config.num_labels
            shapes = {name: shape for name, shape in shapes.items() if module_of(name) not in HEADS}
            shapes[f"{HEAD}weight"], shapes[f"{HEAD}bias"] = (labels, self.config.hidden_size), (labels,)
        if self.is_prefix_alone:
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
        return shapes

    @property
    def is_classifier(self) -> bool:
        """ChatGLMForSequenceClassification: a head for labels in place of the output layer."""
        return any(name.startswith(HEAD) for name in self.state)

    @property
    def is_prefix_alone(self) -> bool:
        """What P-Tuning v2 saves: the prefix encoder, to be loaded beside the weights it was trained on."""
        return bool(self.state) and all(name.startswith(PREFIX) for name in self.state)


def module_of(name: str) -> str:
    return name.rpartition(".")[0]
