#pragma once

// What a looping graph is given before it is computed: the masks that limit attention and states it begins with. It also
// knows which nodes need not be computed any more once the loop has halted.

#include "llama-graph.h"

class llama_loop_input : public llm_graph_input_i {
public:
    llama_loop_input(llama_loop_plan_ptr plan, ggml_cgraph * gf);

    void set_input(const llama_ubatch * ubatch) override;

    // shapes follow those of the attention's own inputs, and any other plan is another graph
    bool can_reuse(const llm_graph_params & params) override;

    // a mask to add to this one: -inf where later evaluations must not look
    ggml_tensor * limit(ggml_context * ctx, const ggml_tensor * kq_mask, const llama_kv_cache * kv);

    // a state that is given, of the shape of this one
    ggml_tensor * given(ggml_context * ctx, const ggml_tensor * cur, const std::vector<float> & data);

    // if the loop halts at this step, the nodes from here on, up to end_halts, change nothing
    void begin_halt(const ggml_tensor * step, int32_t n_left);
    void end_halts();

    // leave out what need not be computed; returns the evaluations saved, 0 where a device cannot leave out nodes
    int32_t halt(const ggml_tensor * step);

    // whether a node belongs to evaluations after the loop has halted, computed or not
    bool is_idle(const ggml_tensor * node) const;

private:
    struct mask {
        ggml_tensor * t;

        const llama_kv_cache * kv; // null: attention among the tokens of the ubatch
    };

    struct span {
        const ggml_tensor * step;

        int32_t begin;
        int32_t end;
        int32_t n_left; // evaluations

        bool halted;
    };

    template <typename T>
    void fill(const mask & m, const llama_ubatch & ubatch, T keep, T drop) const;

    const llama_loop_plan_ptr plan;

    ggml_cgraph * gf;

    std::vector<mask>          masks;
    std::vector<span>          spans;
    std::vector<ggml_tensor *> left_out; // in the last compute

    std::vector<std::pair<ggml_tensor *, const std::vector<float> *>> states; // of the plan
};
