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
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define LLAMA_LOOP_ABI       2
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
        LLAMA_LOOP_ERR_WINDOW     = -1, // not 1 <= first < last <= n_layer - 1
        LLAMA_LOOP_ERR_PLAN       = -2, // a field out of range, or a halt that the tableau does not allow
        LLAMA_LOOP_ERR_ARCH       = -3, // the graph of this architecture does not pass through the window
        LLAMA_LOOP_ERR_RECURRENT  = -4, // a layer of the window carries recurrent state: kv must be first or each
        LLAMA_LOOP_ERR_MEMORY     = -5, // the context has a kind of memory that does not know loops
        LLAMA_LOOP_ERR_ALLOC      = -6, // out of memory
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

    // Version of this interface and identity of the patch, to be checked by callers before anything else.
    LLAMA_API int32_t      llama_loop_abi(void);
    LLAMA_API const char * llama_loop_patch_id(void);

    // Give a context a plan and switch it on; NULL removes it, after which graphs are the unmodified ones.
    // Clears the context's memory when the K/V slots change, else keeps it: tokens stay as they were evaluated.
    // On failure the context has no plan.
    LLAMA_API int32_t llama_loop_set(struct llama_context * ctx, const struct llama_loop_params * params);

    // Switch the plan off and on again between two decodes. Off, tokens take the plain single pass;
    // with kv = each their K/V goes to every slot, because one pass is all the passes they have. A window with
    // recurrent layers cannot do that: with kv = each it must stay on.
    LLAMA_API void llama_loop_enable(struct llama_context * ctx, bool enable);

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

#ifdef __cplusplus
}
#endif

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;

class  llama_kv_cache;
struct llama_memory_context_i;
class  llm_graph_result;
class  llama_loop_input;

// a graph was built in which the window never opened or never closed, or not all of it obeys the loop
struct llama_loop_unreached : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What is seen of the graphs while they are computed: states for a trace, and when to halt.
struct llama_loop_watch {
    struct state {
        int32_t il;
        int32_t evaluation;
        int64_t ne[4];

        std::vector<float> data;
    };

    bool trace = false;

    std::vector<state> states;

    llama_loop_input * input = nullptr; // of the graph being computed

    int64_t n_skipped = 0;

    // a ggml_backend_sched_eval_callback
    static bool eval(ggml_tensor * t, bool ask, void * watch);
};

struct llama_loop_plan {
    int32_t first   = 0;
    int32_t last    = 0;
    int32_t n_layer = 0;
    int32_t n_eval  = 0; // 0: the model as it is; 1: as well, but the memory has slots to keep filled
    int32_t n_slot  = 1; // K/V slots per layer of the window

    llama_loop_mode    mode    = LLAMA_LOOP_MODE_BLOCK;
    llama_loop_kv      kv      = LLAMA_LOOP_KV_FIRST;
    llama_loop_routing routing = LLAMA_LOOP_ROUTING_FREE;

    int32_t attention = 0;
    int32_t sinks     = 0;
    double  halt      = 0.0;

    // n_eval rows of A, then B; row i holds the weights of f(y_0) .. f(y_{i-1})
    std::vector<std::vector<double>> rows;

    std::shared_ptr<llama_loop_watch>   watch; // set for halt and trace
    std::shared_ptr<std::vector<float>> lens;  // the state the head is applied to instead of running the layers

    uint32_t n_units()      const { return mode == LLAMA_LOOP_MODE_LAYER ? last - first : 1; }
    uint32_t n_layer_runs() const; // layer evaluations beyond the plain graph's
    uint32_t n_nodes()      const; // graph nodes of the combinations
};

using llama_loop_plan_ptr = std::shared_ptr<const llama_loop_plan>;

// The loop of one graph under construction: re-enters the window by moving the builder's layer index, and decides for
// the current evaluation which K/V slot it reads and writes, which experts it uses and what it attends to.
class llama_loop_graph {
public:
    llama_loop_graph(llama_loop_plan_ptr plan, const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res);
    ~llama_loop_graph();

    llama_loop_graph(const llama_loop_graph &) = delete;
    llama_loop_graph & operator=(const llama_loop_graph &) = delete;

    // called with the state that leaves layer il; returns the state that enters layer il + 1
    ggml_tensor * advance(ggml_tensor * cur, int & il);

    // expand a node of the builder; writes to recurrent state wait for the end of the window, or do not happen
    void expand(ggml_tensor * node);

    // expand a K or V, unless this evaluation stores none
    void expand_kv(ggml_tensor * kv) const;

    // the slot of this cache that this evaluation reads
    uint32_t slot(const llama_kv_cache * kv);

    // the node that stores a K or V in this evaluation
    //   write(slot): creates the node that writes it;  read(): creates a view of what is stored
    ggml_tensor * store(const std::function<ggml_tensor * (uint32_t slot)> & write, const std::function<ggml_tensor * ()> & read);

    // K and V of attention without a cache
    void no_cache(int il, ggml_tensor *& k, ggml_tensor *& v);

    // the recurrent state of a layer in this evaluation
    ggml_tensor * state(const std::vector<ggml_tensor *> & tensors, int il);

    // experts and their weights [n_expert_used, n_tokens]; id: a tensor only this router's experts have
    void route(const ggml_tensor * id, ggml_tensor *& experts, ggml_tensor *& weights);

    // the mask of this evaluation's attention
    ggml_tensor * attention(ggml_tensor * kq_mask);

    // throws unless the window was entered and closed
    void finish(const char * arch_name);

private:
    enum phase_t { BEFORE, INSIDE, RERUN, DONE };

    ggml_tensor * enter_unit(ggml_tensor * cur);
    ggml_tensor * leave_unit(ggml_tensor * cur);
    ggml_tensor * combine(const std::vector<double> & row) const;
    ggml_tensor * halt(ggml_tensor * next);
    ggml_tensor * sum_by_token(ggml_tensor * cur) const;
    ggml_tensor * lens(ggml_tensor * cur, int & il);

    void trace(ggml_tensor * cur, int il, size_t evaluation);

    bool is_later() const { return phase == RERUN || (phase == INSIDE && !f.empty()); } // not the first evaluation
    bool stores_nothing() const;

    llama_loop_input & inputs();

    const llama_loop_plan_ptr      plan;
    const llama_memory_context_i * mctx;

    ggml_context     * ctx;
    ggml_cgraph      * gf;
    llm_graph_result * res;

    phase_t phase = BEFORE;

    int unit_first = 0; // the layers iterated together: the window, or one layer of it
    int unit_last  = 0;

    std::vector<ggml_tensor *> y; // input of each evaluation so far; y[0] = x_0
    std::vector<ggml_tensor *> g; // its result
    std::vector<ggml_tensor *> f; // their difference

    ggml_tensor * result = nullptr; // kept while the window runs once more for its K/V
    ggml_tensor * alive  = nullptr; // [1] 1 until halted, then 0
    ggml_tensor * held   = nullptr; // the state of a halting loop, in a place that evaluations not computed leave alone

    std::vector<ggml_tensor *> pending; // writes to the memory to emit when the unit ends

    std::set<const ggml_tensor *> states;  // recurrent states handed out inside the window
    std::set<const ggml_tensor *> written; // the nodes that may write them

    std::map<const ggml_tensor *, std::pair<ggml_tensor *, ggml_tensor *>> routes; // experts, weights
    std::map<int,                 std::pair<ggml_tensor *, ggml_tensor *>> kvs;    // K, V without a cache
    std::map<const ggml_tensor *, ggml_tensor *>                           masks;

    const llama_kv_cache * kv_last = nullptr; // the cache that was read last

    llama_loop_input * input = nullptr;
};
