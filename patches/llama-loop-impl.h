#pragma once

// The plan a context runs, and what the graph builder does with it. A plan is a tableau (A, B) over a window [first, last).
// What solver and damping it comes from, nothing here knows.

#include "llama-loop.h"

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct ggml_cgraph;
struct ggml_context;
struct ggml_tensor;

class  llama_kv_cache;
struct llama_context;
struct llama_memory_context_i;
class  llm_graph_result;
class  llama_loop_input;

// the context, with the plan of LLAMA_LOOP; null, and no context any more, if that is refused
llama_context * llama_loop_from_environment(llama_context * ctx);

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

// States that decodes begin with, in place of computing them.
struct llama_loop_given {
    std::vector<float> entered; // the window; what the head is applied to, if there is no other
    std::vector<float> left;    // by the first evaluation
};

using llama_loop_given_ptr = std::shared_ptr<const llama_loop_given>;

struct llama_loop_plan {
    int32_t first   = 0;
    int32_t last    = 0;
    int32_t n_layer = 0;
    int32_t n_eval  = 0; // 0: the model as it is; 1: as well, but the memory has slots to keep filled
    int32_t n_slot  = 1; // K/V slots per layer of the window

    bool recurrent = false; // some layer of the window carries recurrent state

    llama_loop_mode    mode    = LLAMA_LOOP_MODE_BLOCK;
    llama_loop_kv      kv      = LLAMA_LOOP_KV_FIRST;
    llama_loop_routing routing = LLAMA_LOOP_ROUTING_FREE;

    int32_t attention = 0;
    int32_t sinks     = 0;
    double  halt      = 0.0;

    // n_eval rows of A, then B; row i holds the weights of f(y_0) .. f(y_{i-1})
    std::vector<std::vector<double>> rows;

    std::shared_ptr<llama_loop_watch> watch; // set for halt and trace
    llama_loop_given_ptr              given; // set for lens and resume

    bool is_lens()    const { return given &&  given->left.empty(); }
    bool is_resumed() const { return given && !given->left.empty(); }

    uint32_t n_units()      const { return mode == LLAMA_LOOP_MODE_LAYER ? last - first : 1; }
    uint32_t n_layer_runs() const; // layer evaluations beyond the plain graph's
    uint32_t n_nodes()      const; // graph nodes of the combinations

    // whether a graph of this plan can be built and held where one of the other was
    bool fits(const llama_loop_plan & other) const;
};

// A plan from what a caller gave; a llama_loop_status. Refuses what this model cannot run.
int32_t llama_loop_plan_init(const llama_model & model, const llama_loop_params & params, llama_loop_plan & plan);

// Whether each layer of this model takes the state from the one before it and nothing else.
bool llama_loop_passes_state_alone(const llama_model & model);

// Keeps what is wrong, and what to do, for llama_loop_error; returns the status.
int32_t llama_loop_refuse(int32_t status, const std::string & what, const std::string & remedy);

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

    // a view of the stored K or V that this evaluation reads
    //   view(slot): creates it
    ggml_tensor * read(const llama_kv_cache * kv, const std::function<ggml_tensor * (uint32_t slot)> & view);

    // the node that stores a K or V in this evaluation
    //   write(cur, slot): creates the node that writes it;  view(slot): creates a view of what is stored
    ggml_tensor * store(
            ggml_tensor * cur,
            const std::function<ggml_tensor * (ggml_tensor * cur, uint32_t slot)> & write,
            const std::function<ggml_tensor * (uint32_t slot)> & view);

    // called when the nodes of an attention are in the graph
    void attended();

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

    ggml_tensor * enter_window(ggml_tensor * cur);
    ggml_tensor * enter_unit(ggml_tensor * cur);
    ggml_tensor * evaluated(ggml_tensor * cur, int & il);
    ggml_tensor * leave_unit(ggml_tensor * cur);
    ggml_tensor * residual(size_t i);
    ggml_tensor * combine(const std::vector<double> & row);
    ggml_tensor * halt(ggml_tensor * next);

    void check_restored();

    ggml_tensor * sum_by_token(ggml_tensor * cur) const;
    ggml_tensor * lens(ggml_tensor * cur, int & il);

    void trace(ggml_tensor * cur, int il, size_t evaluation);

    bool is_later() const { return phase == RERUN || (phase == INSIDE && !g.empty()); } // not the first evaluation
    bool stores_nothing() const;
    bool is_skipped() const { return plan && plan->is_resumed() && phase == BEFORE; } // a layer whose result is given

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
    std::vector<ggml_tensor *> f; // their difference, null until something needs it

    ggml_tensor * result = nullptr; // kept while the window runs once more for its K/V
    ggml_tensor * alive  = nullptr; // [1] 1 until halted, then 0
    ggml_tensor * held   = nullptr; // the state of a halting loop, in a place that evaluations not computed leave alone

    std::vector<ggml_tensor *> pending; // writes to the memory to emit when the unit ends, if not earlier

    std::map<const ggml_tensor *, int> readers;  // stored K or V -> the last attention of an evaluation that reads it
    std::set<const ggml_tensor *>      restored; // the writes of this unit that were emitted early

    int n_attended = 0; // attentions of this evaluation so far
    int i_restored = 0; // where in the graph the first early write is

    std::set<const ggml_tensor *> states;  // recurrent states handed out inside the window
    std::set<const ggml_tensor *> written; // the nodes that may write them

    std::map<const ggml_tensor *, std::pair<ggml_tensor *, ggml_tensor *>> routes; // experts, weights
    std::map<int,                 std::pair<ggml_tensor *, ggml_tensor *>> kvs;    // K, V without a cache
    std::map<const ggml_tensor *, ggml_tensor *>                           masks;

    const llama_kv_cache * kv_last = nullptr; // the cache that was read last

    llama_loop_input * input = nullptr;
};
