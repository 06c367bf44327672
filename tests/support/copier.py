"""A model of hand-made weights that copies: an induction head, which finds the number in a text and repeats it.

    path = copier.write(tmp_path / "copier.gguf")        # solves RULER's niah_single_1 wherever the needle lies

Four layers of a llama. Layer 0 has three heads that look one, two and three tokens back and write what they see into
places of their own. In layer 1 a head looks for the place whose last three tokens are the three read now, and writes
the token there as the next; read now no digit, it looks for the first of a number. Layers 2 and 3 do nothing, so a
loop over them changes nothing. To it a text is digits, full stops, and all else.

Heads that look back need positions: their query and key are the same in 16 rotary pairs but for a turn by so many
positions. Heads that compare need none: `rope_freqs` keeps the other 48 pairs from turning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from support import tiny

N_LAYER, WIDTH, HEADS, HEAD, TURNING = 4, 64, 4, 128, 16
KINDS = "0123456789."
OTHER, CONST, BACK, OUT = len(KINDS), 12, (16, 28, 40), 52
_TURN, _MATCH = 15.0, 17.0  # so sharp that a softmax over 2,000 tokens is one of them


def _kinds() -> np.ndarray:
    """Of each token of the vocabulary, the number of its kind."""
    return np.array([KINDS.index(token) if token in KINDS else OTHER for token in tiny.vocabulary()[0]])


def _looks_back() -> dict[str, np.ndarray]:
    q, k, v, o = (np.zeros(shape, np.float32) for shape in [(HEADS * HEAD, WIDTH)] * 3 + [(WIDTH, HEADS * HEAD)])
    theta = 10000.0 ** (-2 * np.arange(TURNING) / HEAD)
    for h, place in enumerate(BACK):
        pairs = h * HEAD + 2 * np.arange(TURNING)
        q[pairs, CONST], q[pairs + 1, CONST] = _TURN * np.cos((h + 1) * theta), -_TURN * np.sin((h + 1) * theta)
        k[pairs, CONST] = _TURN
        kinds = np.arange(OTHER + 1)
        v[h * HEAD + kinds, kinds] = 1
        o[place + kinds, h * HEAD + kinds] = 1
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": o}


def _copies() -> dict[str, np.ndarray]:
    q, k, v, o = (np.zeros(shape, np.float32) for shape in [(HEADS * HEAD, WIDTH)] * 3 + [(WIDTH, HEADS * HEAD)])
    digits, kinds, free = np.arange(10), np.arange(OTHER + 1), 2 * TURNING
    q[free + digits, digits], k[free + digits, BACK[0] + digits] = 3 * _MATCH, _MATCH
    for step in (0, 1):
        at = free + 12 * (step + 1) + kinds
        q[at, BACK[step] + kinds], k[at, BACK[step + 1] + kinds] = _MATCH, _MATCH
    start = free + 36
    q[start, [OTHER - 1, OTHER]] = 6 * _MATCH
    k[start, digits], k[start, BACK[0] + digits] = _MATCH, -_MATCH
    v[kinds, kinds] = 1
    o[OUT + kinds, kinds] = 3
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": o}


def write(path: Path, n_ctx: int = 4096) -> Path:
    """Write the model to `path` and return it."""
    kinds = _kinds()
    writer = GGUFWriter(path, "llama")
    meta = {
        "vocab_size": len(kinds), "block_count": N_LAYER, "context_length": n_ctx, "embedding_length": WIDTH,
        "feed_forward_length": 32, "attention.head_count": HEADS, "attention.head_count_kv": HEADS,
        "attention.key_length": HEAD, "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": HEAD, "rope.freq_base": 1e4,
    }  # fmt: skip
    for key, value in meta.items():
        tiny.add(writer, f"llama.{key}", value)
    tiny.add_tokenizer(writer)
    embedding, head = np.zeros((len(kinds), WIDTH), np.float32), np.zeros((len(kinds), WIDTH), np.float32)
    embedding[np.arange(len(kinds)), kinds] = embedding[:, CONST] = 1
    for kind, token in enumerate([*KINDS, "a"]):
        head[tiny.vocabulary()[0].index(token), OUT + kind] = 1
    still = np.where(np.arange(HEAD // 2) < TURNING, 1, 1e9).astype(np.float32)
    tensors = {"token_embd": embedding, "output": head, "output_norm": np.ones(WIDTH, np.float32), "rope_freqs": still}
    nothing = {name: np.zeros_like(value) for name, value in _copies().items()}
    # The squares of what is written so far: the kind and the constant, then three kinds more.
    for il, (attention, squares) in enumerate(((_looks_back(), 2), (_copies(), 5), (nothing, 5), (nothing, 5))):
        scale = np.full(WIDTH, np.sqrt(squares / WIDTH), np.float32)
        ffn = {"ffn_gate": (32, WIDTH), "ffn_up": (32, WIDTH), "ffn_down": (WIDTH, 32)}
        layer = {**attention, "attn_norm": scale, "ffn_norm": np.ones(WIDTH, np.float32),
                 **{name: np.zeros(shape, np.float32) for name, shape in ffn.items()}}  # fmt: skip
        tensors |= {f"blk.{il}.{name}": value for name, value in layer.items()}
    for name, value in tensors.items():
        writer.add_tensor(f"{name}.weight", value)
    return tiny.finish(writer, path)
