"""Which architectures can loop a window, by the name a GGUF file gives as `general.architecture`.

    check_architecture("qwen3")          # returns, or raises GgufloopError with the reason

An architecture is allowed once a tiny model of it agrees with the reference for every solver, mode and kv policy; the
graph of another one may look loopable and still be wrong without any error, so everything else is refused by name.
"""

from __future__ import annotations

from ggufloop.errors import GgufloopError, nearest

LOOPS = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "olmoe", "gemma3", "deepseek2")
"""Verified against the reference."""

_REFUSED = {
    "every layer is recurrent": "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7",
    "every layer carries a recurrent state beside its attention": "falcon-h1",
    "some of its layers are recurrent, and a second pass would advance their state": (
        "bailingmoe3 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe minimax-01 nemotron_h"
        " nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next qwen4exp"
    ),
    "its compressed cache is read and rewritten by every pass": "deepseek4",
    "it is a draft model without a stack of its own": "dflash eagle3 gemma4-assistant",
    "it has no stack of transformer layers": "clip wavtokenizer-dec",
    "its graph gives no hold at the end of a layer": (
        "bert eurobert granite granite_swa granitemoe graniteswitch hrm_text hy_v4 jina-bert-v2 jina-bert-v3 minicpm"
        " modern-bert neo-bert nomic-bert nomic-bert-moe"
    ),
}
_REASON = {arch: reason for reason, archs in _REFUSED.items() for arch in archs.split()}

_UNVERIFIED = """
    afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chameleon chatglm codeshell cogvlm cohere2
    cohere2moe command-r dbrx deci deepseek deepseek2-ocr deepseek32 dots1 dots3note dream ernie4_5 ernie4_5-moe
    exaone exaone-moe exaone4 falcon gemma gemma-embedding gemma2 gemma3n gemma4 glm-dsa glm4 glm4moe gpt-oss gpt2
    gptneox grok grovemoe hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 laguna llada llada-moe
    llama-embed llama4 maincoder maple mellum mimo2 minicpm3 minimax-m2 minimax-m3 mistral3 mistral4 mpt muse-glimmer
    nanbeige nemotron olmo olmo2 openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo3 plm
    pockettts qwen qwen2vl qwen3tts qwen3vl qwen3vlmoe refact rnd1 seed_oss smallthinker smollm3 spark2_5 stablelm
    starcoder starcoder2 step35 t5 t5encoder talkie xverse
"""
_KNOWN = frozenset(_UNVERIFIED.split()) | frozenset(_REASON)


def refusal(arch: str) -> str | None:
    """Why models of this architecture cannot loop, None if they can."""
    if arch in LOOPS:
        return None
    return _REASON.get(arch, "not verified yet" if arch in _KNOWN else "the pinned llama.cpp does not know it")


def check_architecture(arch: str) -> None:
    """Raise GgufloopError, naming the reason, unless models of this architecture can loop."""
    reason = refusal(arch)
    if reason is None:
        return
    plain = f"run it without --window; these can loop: {', '.join(LOOPS)}."
    raise GgufloopError(
        f"architecture {arch} cannot loop: {reason}.", plain if arch in _KNOWN else nearest(arch, LOOPS)
    )
