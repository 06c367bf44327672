#pragma once

// Looping a window of layers: the plan a context runs, what the graph builder does with it, and the C interface.
//
// A plan is a tableau (A, B) over a window [first, last). With g the window and f(x) = g(x) - x, the graph evaluates
//     y_i = x_0 + sum_j A_ij f(y_j)    and leaves the window with    x_0 + sum_j B_j f(y_j).
// Solver names, damping and decode policies are the caller's business; nothing here knows them.

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define LLAMA_LOOP_ABI       1
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

    enum llama_loop_status {
        LLAMA_LOOP_OK             =  0,
        LLAMA_LOOP_ERR_WINDOW     = -1, // not 1 <= first < last <= n_layer - 1
        LLAMA_LOOP_ERR_PLAN       = -2, // n_eval, A, B, mode or kv out of range
        LLAMA_LOOP_ERR_ARCH       = -3, // the graph of this architecture does not pass through the window
        LLAMA_LOOP_ERR_RECURRENT  = -4, // a layer of the window carries recurrent state
        LLAMA_LOOP_ERR_MEMORY     = -5, // the context has no memory, or a kind that does not know loops
        LLAMA_LOOP_ERR_ALLOC      = -6, // out of memory
    };

    // Version of this interface and identity of the patch, to be checked by callers before anything else.
    LLAMA_API int32_t      llama_loop_abi(void);
    LLAMA_API const char * llama_loop_patch_id(void);

    // Give a context a plan and switch it on; n_eval = 0 removes it, after which graphs are the unmodified ones.
    //   A: [n_eval*n_eval] row-major, strictly lower triangular;  B: [n_eval]
    // Clears the context's memory when the K/V slots change. On failure the context has no plan.
    LLAMA_API int32_t llama_loop_set(
            struct llama_context * ctx,
                         int32_t   first,
                         int32_t   last,
                         int32_t   n_eval,
                    const double * A,
                    const double * B,
                         int32_t   mode,
                         int32_t   kv);

    // Switch the plan off and on again between two decodes. Off, tokens take the plain single pass;
    // with kv = each their K/V goes to every slot, because one pass is all the passes they have.
    LLAMA_API void llama_loop_enable(struct llama_context * ctx, bool enable);

    // Bytes the context's memory (K/V and recurrent state) occupies on all devices, slots of the plan included.
    LLAMA_API size_t llama_loop_memory_size(const struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;

struct llama_memory_context_i;

struct llama_loop_plan {
    int32_t first  = 0;
    int32_t last   = 0;
    int32_t n_eval = 0; // 1: no loop, but the memory has slots to keep filled
    int32_t n_slot = 1; // K/V slots per layer of the window

    llama_loop_mode mode = LLAMA_LOOP_MODE_BLOCK;
    llama_loop_kv   kv   = LLAMA_LOOP_KV_FIRST;

    // n_eval rows of A, then B; row i holds the weights of f(y_0) .. f(y_{i-1})
    std::vector<std::vector<double>> rows;

    uint32_t n_units()      const { return mode == LLAMA_LOOP_MODE_LAYER ? last - first : 1; }
    uint32_t n_layer_runs() const; // layer evaluations beyond the plain graph's
    uint32_t n_nodes()      const; // graph nodes of the combinations
};

using llama_loop_plan_ptr = std::shared_ptr<const llama_loop_plan>;

// The loop of one graph under construction: re-enters the window by moving the builder's layer index,
// and tells the memory which K/V slot the current evaluation reads and writes.
class llama_loop_graph {
public:
    llama_loop_graph(llama_loop_plan_ptr plan, const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf);
    ~llama_loop_graph();

    llama_loop_graph(const llama_loop_graph &) = delete;
    llama_loop_graph & operator=(const llama_loop_graph &) = delete;

    // called with the state that leaves layer il; returns the state that enters layer il + 1
    ggml_tensor * advance(ggml_tensor * cur, int & il);

    // expand a K or V, unless this evaluation stores none
    void expand_kv(ggml_tensor * kv) const;

    // the slot this evaluation reads
    uint32_t slot() const;

    // the node that stores a K or V in this evaluation
    //   write(slot): creates the node that writes it;  read(): creates a view of what is stored
    ggml_tensor * store(const std::function<ggml_tensor * (uint32_t slot)> & write, const std::function<ggml_tensor * ()> & read);

    // throws unless the window was entered and closed
    void finish(const char * arch_name) const;

private:
    enum phase_t { BEFORE, INSIDE, RERUN, DONE };

    ggml_tensor * enter_unit(ggml_tensor * cur);
    ggml_tensor * leave_unit(ggml_tensor * cur);
    ggml_tensor * combine(const std::vector<double> & row) const;

    bool stores_nothing() const;

    const llama_loop_plan_ptr      plan;
    const llama_memory_context_i * mctx;

    ggml_context * ctx;
    ggml_cgraph  * gf;

    phase_t phase = BEFORE;

    int unit_first = 0; // the layers iterated together: the window, or one layer of it
    int unit_last  = 0;

    std::vector<ggml_tensor *> y; // input of each evaluation so far; y[0] = x_0
    std::vector<ggml_tensor *> g; // its result
    std::vector<ggml_tensor *> f; // their difference

    ggml_tensor * result = nullptr; // kept while the window runs once more for its K/V

    std::vector<ggml_tensor *> pending; // K/V writes to emit when the unit ends
};
