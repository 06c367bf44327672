#pragma once

// Looping a window of layers: the C interface. llama-loop-impl.h is what the library itself needs.
//
// A plan is a tableau (A, B) over a window [first, last). With g the window and f(x) = g(x) - x, the graph evaluates
//     y_i = x_0 + sum_j A_ij f(y_j)    and leaves the window with    x_0 + sum_j B_j f(y_j).
// Solver names, damping and decode policies are known to llama_loop_parse alone, which reads them from a text.

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LLAMA_LOOP_ABI       5
#define LLAMA_LOOP_MAX_EVALS 64

#ifdef __cplusplus
extern "C" {
#endif

    enum llama_loop_mode {
        LLAMA_LOOP_MODE_BLOCK = 0, // iterate the window as one map
        LLAMA_LOOP_MODE_LAYER = 1, // finish each layer of the window before the next
    };

    enum llama_loop_kv {
        LLAMA_LOOP_KV_FIRST  = 0, // the cache keeps the K/V of the first evaluation
        LLAMA_LOOP_KV_LAST   = 1, // the cache keeps the K/V of one more run on the result
        LLAMA_LOOP_KV_EACH   = 2, // every evaluation has a K/V slot of its own
        LLAMA_LOOP_KV_FROZEN = 3, // later evaluations read the first one's K/V and compute none
    };

    enum llama_loop_routing {
        LLAMA_LOOP_ROUTING_FREE   = 0, // every evaluation chooses its experts
        LLAMA_LOOP_ROUTING_FROZEN = 1, // the experts and weights of a layer's first evaluation serve all of them
    };

    enum llama_loop_status {
        LLAMA_LOOP_OK             =  0,
        LLAMA_LOOP_ERR_WINDOW     = -1, // not 1 <= first < last <= n_layer - 1, or its layers depend on others
        LLAMA_LOOP_ERR_PLAN       = -2, // a field out of range, or a halt that the tableau does not allow
        LLAMA_LOOP_ERR_ARCH       = -3, // this architecture, or this type of context, cannot loop
        LLAMA_LOOP_ERR_RECURRENT  = -4, // a layer of the window carries recurrent state, which rules this out
        LLAMA_LOOP_ERR_MEMORY     = -5, // the context has a kind of memory that cannot keep what the plan needs
        LLAMA_LOOP_ERR_ALLOC      = -6, // out of memory
        LLAMA_LOOP_ERR_LOST       = -7, // out of memory, and the context has lost its plan as well
        LLAMA_LOOP_ERR_TEXT       = -8, // a text that is no loop
    };

    struct llama_loop_params {
        int32_t first;
        int32_t last;
        int32_t n_eval;

        const double * A; // [n_eval*n_eval] row-major, strictly lower triangular
        const double * B; // [n_eval]

        int32_t mode;
        int32_t kv;
        int32_t routing;

        int32_t attention; // evaluations after the first attend to this many last positions, 0: to all
        int32_t sinks;     // and to this many first ones

        // stop when an evaluation moves the states of the ubatch's tokens, relative to their norms, by less than this
        // on average; 0: never.
        // Only for tableaus whose every stage adds to the one before it the residual of that one; not with kv = each.
        double halt;
    };

    // What a text says: a plan, and which generated tokens loop.
    struct llama_loop_spec {
        struct llama_loop_params params; // but for A and B, which are below: see llama_loop_spec_params

        int32_t decode_first;   // the first so many after a prompt; -1: all
        double  decode_entropy; // those whose distribution, evaluated plain, has an entropy above this, in nats; -1: none

        double A[LLAMA_LOOP_MAX_EVALS*LLAMA_LOOP_MAX_EVALS];
        double B[LLAMA_LOOP_MAX_EVALS];
    };

    // Version of this interface and identity of the patch, to be checked by callers before anything else.
    LLAMA_API int32_t      llama_loop_abi(void);
    LLAMA_API const char * llama_loop_patch_id(void);

    // What the last of these functions that failed on this thread has to say: what is wrong, a line break, what to do.
    LLAMA_API const char * llama_loop_error(void);

    // Give a context a plan and switch it on; NULL removes it, after which graphs are the unmodified ones.
    // Clears the context's memory when the K/V slots change, else keeps it: tokens stay as they were evaluated.
    // A plan that is refused leaves the context as it was: plan, memory and outputs. Only when memory runs out, the context
    // may be empty afterwards; it has the plan it had, or none if the status says so.
    LLAMA_API int32_t llama_loop_set(struct llama_context * ctx, const struct llama_loop_params * params);

    // Read a loop's text, such as `12:16 k=3 solver=euler beta=0.5 kv=frozen decode=bypass`. n_layer: of the model the window
    // has to lie in; 0: not known yet.
    LLAMA_API int32_t llama_loop_parse(const char * text, int32_t n_layer, struct llama_loop_spec * spec);

    // The plan of a spec, good while the spec is.
    LLAMA_API struct llama_loop_params llama_loop_spec_params(const struct llama_loop_spec * spec);

    // Whether llama_loop_set would take this plan, but for want of memory; changes nothing.
    LLAMA_API int32_t llama_loop_check(const struct llama_context * ctx, const struct llama_loop_params * params);

    // Parse and set, decode policy included: every decode of a single token behind others is a generated token then. (A plan
    // given to llama_loop_set has no policy: the caller knows what it decodes, and has llama_loop_enable.) `entropy:t` is
    // refused, as it wants a token evaluated twice. NULL and "" remove the plan.
    // llama_init_from_model does this with the environment variable LLAMA_LOOP, and fails if the text is refused.
    LLAMA_API int32_t llama_loop_set_text(struct llama_context * ctx, const char * text);

    // Switch the plan off and on again between two decodes. Off, tokens take the plain single pass;
    // with kv = each their K/V goes to every slot, because one pass is all the passes they have. A window with
    // recurrent layers cannot do that: with kv = each switching off is refused, and the plan stays on.
    LLAMA_API int32_t llama_loop_enable(struct llama_context * ctx, bool enable);

    // Whether a layer carries recurrent state, which limits what a window with it can do: see kv and llama_loop_enable.
    LLAMA_API bool llama_loop_is_recurrent(const struct llama_context * ctx, int32_t il);

    // Bytes the context's memory (K/V and recurrent state) occupies on all devices, slots of the plan included.
    LLAMA_API size_t llama_loop_memory_size(const struct llama_context * ctx);

    // Window evaluations that halt did not have to compute, since the plan was set.
    LLAMA_API int64_t llama_loop_skipped(const struct llama_context * ctx);

    // Record the state that leaves each layer, in order of execution, until switched off; the record goes with either.
    // An entry is one ubatch's state after an evaluation (from 1) of layer il. Where the window is entered again,
    // the state that enters is an entry of the layer before it, and what finally leaves is one more of its last layer.
    LLAMA_API void          llama_loop_trace(struct llama_context * ctx, bool enable);
    LLAMA_API int32_t       llama_loop_trace_count(const struct llama_context * ctx);
    LLAMA_API const float * llama_loop_trace_get(
            const struct llama_context * ctx,
                               int32_t   i,
                               int32_t * il,
                               int32_t * evaluation,
                               int64_t * ne); // [4]

    // Until called with NULL: decodes skip the layers and apply the model's head to this state, n floats as
    // llama_loop_trace_get gives them. The ubatch must have its tokens, and all of them must be outputs.
    LLAMA_API void llama_loop_lens(struct llama_context * ctx, const float * state, size_t n);

    // Until called with NULL: decodes begin in the window, after its first evaluation. entered: the state that enters the
    // window; left: what the first evaluation makes of it, in layer mode that of the window's first layer. Both are n floats
    // as llama_loop_trace_get gives them for the same tokens, which must be one ubatch on an empty memory, under any loop of
    // this window or none. The results are those of the whole graph; the memory is not, so nothing may follow.
    // With kv = first and no frozen experts, where no layer reads what earlier ones keep beside the state.
    LLAMA_API int32_t llama_loop_resume(struct llama_context * ctx, const float * entered, const float * left, size_t n);

#ifdef __cplusplus
}
#endif
