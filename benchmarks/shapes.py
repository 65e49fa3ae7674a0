"""The layer shapes of the two published models; nothing but Python is needed, so every environment reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. Matrices are [rows, columns] = [out, in]."""

    family: str
    hidden: int
    qkv_rows: int
    up_rows: int  # of the first MLP matrix; ChatGLM2-6B's holds gate and up
    down_columns: int
    vocabulary: int
    heads: int
    key_value_heads: int
    layers: int = 28

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The four matrices of a block."""
        return {
            "query_key_value": (self.qkv_rows, self.hidden),
            "dense": (self.hidden, self.hidden),
            "dense_h_to_4h": (self.up_rows, self.hidden),
            "dense_4h_to_h": (self.hidden, self.down_columns),
        }

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads

    @property
    def block_weights(self) -> int:
        """Numbers in the matrices of a block."""
        return sum(rows * columns for rows, columns in self.matrices.values())


SHAPES = {
    "chatglm2-6b": Shape("chatglm2", 4096, 4608, 2 * 13696, 13696, 65024, 32, 2),
    "chatglm-6b": Shape("chatglm", 4096, 3 * 4096, 16384, 16384, 130528, 32, 32),
}
