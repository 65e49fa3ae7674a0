"""Single products of the peers, through the ggml library inside their Python packages.

llama.cpp and chatglm.cpp multiply with ggml, a C library of which each carries a version of its own. A graph
of one product is what a layer of theirs runs; weights lie where the program puts them, repacked if it would.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from .model_files import BLOCK_BYTES, GGML_TYPES, Tensor, random_pool, write_data
from .shapes import SHAPES
from .worker import serve

POINTER, INT, SIZE, BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_bool
CONTEXT_BYTES = 1 << 20  # holds descriptions, no numbers


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", BOOL)]


# The functions that are called: result, arguments.
FUNCTIONS = {
    "ggml_init": (POINTER, [InitParams]),
    "ggml_new_tensor_2d": (POINTER, [POINTER, INT, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (POINTER, [POINTER, POINTER, POINTER]),
    "ggml_new_graph_custom": (POINTER, [POINTER, SIZE, BOOL]),
    "ggml_build_forward_expand": (None, [POINTER, POINTER]),
    "ggml_backend_cpu_init": (POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [POINTER, INT]),
    "ggml_backend_get_default_buffer_type": (POINTER, [POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, [POINTER, POINTER]),
    "ggml_backend_buffer_free": (None, [POINTER]),
    "ggml_backend_tensor_set": (None, [POINTER, ctypes.c_char_p, SIZE, SIZE]),
    "ggml_backend_supports_op": (BOOL, [POINTER, POINTER]),
    "ggml_backend_graph_compute": (INT, [POINTER, POINTER]),
}
# Where newer versions keep weights that are repacked for the processor.
EXTRA_FUNCTIONS = {
    "ggml_backend_get_device": (POINTER, [POINTER]),
    "ggml_backend_dev_backend_reg": (POINTER, [POINTER]),
    "ggml_backend_reg_get_proc_address": (POINTER, [POINTER, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [POINTER]),
}


class Library:
    """The ggml of a program, with its functions as attributes."""

    def __init__(self, program: str) -> None:
        if program == "llama.cpp":
            import llama_cpp

            folder, package = Path(llama_cpp.__file__).parent / "lib", "llama-cpp-python"
            files = [next(folder.glob(f"*{name}.*")) for name in ("ggml-base", "ggml-cpu")]
        else:
            import chatglm_cpp._C as extension

            files, package = [Path(extension.__file__)], "chatglm-cpp"
        self.version = f"{package} {importlib.metadata.version(package)}"
        libraries = [ctypes.CDLL(str(file)) for file in files]
        self.has_extra = all(self._bind(libraries, *item) for item in EXTRA_FUNCTIONS.items())
        missing = [item[0] for item in FUNCTIONS.items() if not self._bind(libraries, *item)]
        if missing:
            raise RuntimeError(f"The ggml library of {self.version} does not offer {missing[0]}.")

    def _bind(self, libraries: list[ctypes.CDLL], name: str, types: tuple[Any, list[Any]]) -> bool:
        function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
        if function is None:
            return False
        function.restype, function.argtypes = types
        setattr(self, name, function)
        return True

    def context(self) -> int:
        return self.ggml_init(InitParams(CONTEXT_BYTES, None, True))

    def weight_places(self, backend: int) -> dict[str, int]:
        """Kinds of memory for weights, those that repack first, as llama.cpp tries them."""
        places = {}
        if self.has_extra:
            registry = self.ggml_backend_dev_backend_reg(self.ggml_backend_get_device(backend))
            address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
            if address:
                find = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)
                for place in find(self.ggml_backend_get_device(backend)):
                    if not place:  # the list ends with a null
                        break
                    places[self.ggml_backend_buft_name(place).decode()] = place
        return places | {"as in the file": self.ggml_backend_get_default_buffer_type(backend)}


class Layers:
    """The four matrices of a block, several copies of each; the counterpart of `ours.Layers`."""

    def __init__(self, program: str, kind: str, model: str, copies: int, threads: int) -> None:
        self.library, self.kind = Library(program), kind
        self.backend = self.library.ggml_backend_cpu_init()
        self.library.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.matrices, self.places = SHAPES[model].matrices, set()
        self.pool = random_pool(kind)
        self.blocks = [
            {name: self._weight(name, *sizes) for name, sizes in self.matrices.items()} for _ in range(copies)
        ]
        self.graphs: dict[int, list[dict[str, int]]] = {}

    def _weight(self, name: str, rows: int, columns: int) -> int:
        """A matrix of random numbers in the first kind of memory from which it can be multiplied."""
        tensor = Tensor(name, rows, columns, self.kind)
        data = io.BytesIO()
        write_data(data, tensor, self.pool)
        for label, place in self.library.weight_places(self.backend).items():
            context = self.library.context()
            weight = self.library.ggml_new_tensor_2d(context, GGML_TYPES[self.kind], columns, rows)
            buffer = self.library.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
            if not buffer:
                continue
            x = self.library.ggml_new_tensor_2d(context, GGML_TYPES["f32"], columns, 1)
            product = self.library.ggml_mul_mat(context, weight, x)
            if self.library.ggml_backend_supports_op(self.backend, product):
                self.library.ggml_backend_tensor_set(weight, data.getvalue(), 0, tensor.nbytes)
                self.places.add(label)
                return weight
            self.library.ggml_backend_buffer_free(buffer)
        raise RuntimeError(f"ggml has no product for {self.kind}.")

    def _graphs(self, rows: int) -> list[dict[str, int]]:
        """A graph of one product for every matrix, with inputs of random numbers."""
        if rows not in self.graphs:
            pool = random_pool("f32")
            self.graphs[rows] = [
                {
                    name: self._graph(weight, rows, self.matrices[name][1], pool)
                    for name, weight in block.items()
                }
                for block in self.blocks
            ]
        return self.graphs[rows]

    def _graph(self, weight: int, rows: int, columns: int, pool: bytes) -> int:
        context = self.library.context()
        x = self.library.ggml_new_tensor_2d(context, GGML_TYPES["f32"], columns, rows)
        product = self.library.ggml_mul_mat(context, weight, x)
        place = self.library.ggml_backend_get_default_buffer_type(self.backend)
        self.library.ggml_backend_alloc_ctx_tensors_from_buft(context, place)
        data = io.BytesIO()
        write_data(data, Tensor("x", rows, columns, "f32"), pool)
        self.library.ggml_backend_tensor_set(x, data.getvalue(), 0, 4 * rows * columns)
        graph = self.library.ggml_new_graph_custom(context, 8, False)
        self.library.ggml_build_forward_expand(graph, product)
        return graph

    def about(self) -> dict[str, Any]:
        bits = BLOCK_BYTES[self.kind] / 32 if self.kind in BLOCK_BYTES else 2
        sizes = {name: int(rows * columns * bits) for name, (rows, columns) in self.matrices.items()}
        return {
            "version": self.library.version,
            "bytes read": sizes,
            "copies": len(self.blocks),
            "said": [f"weights: {', '.join(sorted(self.places))}"],
        }

    def run(self, rows: int, seconds: float) -> dict[str, float]:
        """Mean seconds of each of the four products on `rows` rows, over `seconds` or one pass at least."""
        graphs = self._graphs(rows)
        spent, calls = dict.fromkeys(self.matrices, 0.0), 0
        end = time.perf_counter() + seconds
        while not calls or time.perf_counter() < end:
            for block in graphs:
                for name, graph in block.items():
                    start = time.perf_counter()
                    self.library.ggml_backend_graph_compute(self.backend, graph)
                    spent[name] += time.perf_counter() - start
                calls += 1
        means = {name: total / calls for name, total in spent.items()}
        return means | {"": sum(means.values())}


if __name__ == "__main__":
    serve(Layers, json.loads(sys.argv[1]))
