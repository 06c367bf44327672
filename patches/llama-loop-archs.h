// Which architectures can loop a window, and which windows. llama-loop-check.cpp reads this as macros and
// ggufloop/models/architectures.py as text, so that both refuse the same, with the same words.
//
// An architecture is here once the architecture matrix (tests/oracles/matrix.py) has run tiny models of it: loop off equal
// to the stock library, an undamped loop equal to the file with the window repeated, damped loops independent of how a text is cut
// into batches. A graph may look loopable and still be wrong without any error, so everything else is refused by name.
//
//   LOOP_ARCHS(names)                       these can loop
//   LOOP_REFUSED(names, reason)             these cannot
//   LOOP_INDEXED(names)                     an indexer chooses what these attend to
//   LOOP_RULE(names, rule, broken, remedy)  their windows obey the rule, a function of this name in both languages; what is
//                                           said of one that does not, with the numbers that the rule finds

LOOP_ARCHS(
    "afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bitnet bloom chatglm codeshell "
    "cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr deepseek32 dots1 dots3note dream "
    "ernie4_5 ernie4_5-moe exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma2 gemma3 gemma3n gemma4 glm-dsa glm4 "
    "glm4moe gpt-oss gpt2 gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok grovemoe "
    "hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jamba kimi-k3 kimi-linear laguna lfm2 lfm2moe "
    "llada llada-moe llama llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 "
    "minimax-m3 mistral3 mistral4 mpt muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe olmo olmo2 olmoe "
    "openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe "
    "qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe refact rnd1 rwkv6 rwkv6qwen2 rwkv7 "
    "seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 talkie xverse")

LOOP_REFUSED("deepseek4", "its compressed cache is read and rewritten by every pass")
LOOP_REFUSED("hy_v4", "its graph gives no hold at the end of a layer")
LOOP_REFUSED("dflash eagle3 gemma4-assistant", "it is a draft model without a stack of its own")
LOOP_REFUSED("clip wavtokenizer-dec", "it has no stack of transformer layers")
LOOP_REFUSED(
    "bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert nomic-bert-moe "
    "t5encoder",
    "it computes embeddings, not the next token")
LOOP_REFUSED("glm5-next qwen4exp", "its recurrent layers share their cache with an indexer, which has no slot per pass")
LOOP_REFUSED("hrm_text", "its stacks take turns on two streams, which is a loop already")
LOOP_REFUSED("t5", "it has two stacks, an encoder and a decoder, and a window would mean both")
LOOP_REFUSED("chameleon", "llama.cpp has it half done and means to remove it")
LOOP_REFUSED("gptj", "llama.cpp knows its name but has no graph for it")

// what the indexer chooses need not be among the last positions, and a token that sees none becomes NaN; the sparse layers
// of minimax-m3 do not pass where attention is limited
LOOP_INDEXED("deepseek32 dots3note glm-dsa minimax-m3")

LOOP_RULE("gemma4", shared_kv,
    "its layers from {0} on read the K/V of layers {1} and {2}",
    "use a window that ends at {1}, or one that starts at {0}.")
LOOP_RULE("gemma3n", shared_kv_from_20,
    "its layers from {0} on read the K/V of layers {1} and {2}",
    "use a window that ends at {1}, or one that starts at {0}.")
LOOP_RULE("deci", ends_with_ffn,
    "layer {0} has no feed-forward network",
    "use a window that holds no such layer and does not start right after one.")
LOOP_RULE("qwen3tts qwen3vl qwen3vlmoe", after_deepstack,
    "its first {0} layers add the features of an image",
    "use a window that starts at {1} or later.")
LOOP_RULE("granite granite_swa", outside_deepstack,
    "layer {0} adds the features of an image",
    "use a window that holds no such layer.")
LOOP_RULE("glm-dsa", starts_with_indexer,
    "layer {0} uses the selection of an earlier layer's indexer",
    "use a window that starts at {1}.")
LOOP_RULE("bailingmoe3 kimi-k3 kimi-linear", without_kda,
    "layer {0} is recurrent",
    "use a window of attention layers only.")
LOOP_RULE("kimi-k3", between_banks,
    "layer {0} banks the residual, once more on every pass",
    "use a window between multiples of {1}.")
LOOP_RULE("rwkv6 rwkv6qwen2", without_rescale,
    "layer {0} halves the residual",
    "use a window that ends at {0} or starts at {1}.")
