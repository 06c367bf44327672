"""A second opinion: the looped model in float64 torch, written from the definition and not from the backend.

    from reference import Reference
    ref = Reference("m.gguf", loop=LoopSpec((12, 16), k=3))
    logits = ref.eval(tokens)                # (n_tokens, n_vocab) float64, appended after what is cached
    keys, values = ref.kv(12)                # ref.state(13) of a recurrent layer

Slow on purpose: it dequantises every weight to float64 and runs each solver as its own update rule on hidden states,
reading a LoopSpec only for its settings and never its tableau. What it shares with the backend is the GGUF file.
Needs the extra `test` (torch). One file per concern: gguf_file (metadata, dequantised tensors), attention and
recurrent (what mixes positions), layers (the arithmetic of one layer, ten families), solvers (update rules), model
(cache; kv, decode and halting policies).
"""

from reference.model import Reference

__all__ = ["Reference"]
