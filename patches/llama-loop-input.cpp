#include "llama-loop-input.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

llama_loop_input::llama_loop_input(llama_loop_plan_ptr plan, ggml_cgraph * gf) : plan(std::move(plan)), gf(gf) {
}

template <typename T>
void llama_loop_input::fill(const mask & m, const llama_ubatch & ubatch, T keep, T drop) const {
    GGML_ASSERT(ggml_backend_buffer_is_host(m.t->buffer)); // as all masks

    const int64_t n_kv   = m.t->ne[0];
    const int64_t n_rows = m.t->ne[1]*m.t->ne[3];

    std::vector<llama_pos> pos; // of the keys

    llama_seq_id seq_id = -1;

    for (int64_t i = 0; i < std::min<int64_t>(n_rows, ubatch.n_tokens); ++i) {
        if (pos.empty() || (m.kv && ubatch.seq_id[i][0] != seq_id)) {
            seq_id = ubatch.seq_id[i][0];
            pos    = m.kv ? m.kv->loop_pos(seq_id, n_kv) : std::vector<llama_pos>(ubatch.pos, ubatch.pos + n_kv);
        }

        T * row = (T *) m.t->data + i*n_kv;
        for (int64_t j = 0; j < n_kv; ++j) {
            row[j] = std::abs(ubatch.pos[i] - pos[j]) >= plan->attention && pos[j] >= plan->sinks ? drop : keep;
        }
    }
}

bool llama_loop_input::can_reuse(const llm_graph_params & /*params*/) {
    return true;
}

void llama_loop_input::set_input(const llama_ubatch * ubatch) {
    for (auto * node : left_out) {
        node->flags |= GGML_TENSOR_FLAG_COMPUTE;
    }
    left_out.clear();

    for (auto & s : spans) {
        s.halted = false;
    }

    if (plan->watch) {
        plan->watch->input = this;
    }

    for (const auto & m : masks) {
        if (m.t->type == GGML_TYPE_F16) {
            fill(m, *ubatch, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
        } else {
            fill(m, *ubatch, 0.0f, -INFINITY);
        }
    }

    for (const auto & [t, data] : states) {
        ggml_backend_tensor_set(t, data->data(), 0, std::min(data->size()*sizeof(float), ggml_nbytes(t)));
    }
}

//
// attention
//

ggml_tensor * llama_loop_input::limit(ggml_context * ctx, const ggml_tensor * kq_mask, const llama_kv_cache * kv) {
    ggml_tensor * t = ggml_new_tensor(ctx, kq_mask->type, GGML_MAX_DIMS, kq_mask->ne);
    ggml_set_input(t);
    ggml_set_name(t, "loop_attn_limit");

    masks.push_back({ t, kv });

    return t;
}

std::vector<llama_pos> llama_kv_cache::loop_pos(llama_seq_id seq_id, uint32_t n_kv) const {
    const auto & cells = v_cells.at(seq_to_stream.at(seq_id));

    std::vector<llama_pos> res(n_kv, -1);
    for (uint32_t i = 0; i < n_kv; ++i) {
        if (!cells.is_empty(i)) {
            res[i] = cells.pos_get(i);
        }
    }

    return res;
}

//
// states
//

ggml_tensor * llama_loop_input::given(ggml_context * ctx, const ggml_tensor * cur, const std::vector<float> & data) {
    ggml_tensor * t = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, cur->ne);
    ggml_set_input(t);
    ggml_format_name(t, "loop_given-%d", (int) states.size());

    states.push_back({ t, &data });

    return t;
}

//
// halt
//

void llama_loop_input::begin_halt(const ggml_tensor * step, int32_t n_left) {
    spans.push_back({ step, ggml_graph_n_nodes(gf), -1, n_left, false });
}

void llama_loop_input::end_halts() {
    for (auto & s : spans) {
        if (s.end < 0) {
            s.end = ggml_graph_n_nodes(gf);
        }
    }
}

int32_t llama_loop_input::halt(const ggml_tensor * step) {
    const auto s = std::find_if(spans.begin(), spans.end(), [&](const span & s) { return s.step == step; });
    if (s == spans.end()) {
        return 0;
    }

    s->halted = true;

    // other backends compute the nodes, which changes nothing: some do not look at the flag, others keep the
    // graph they were sent
    for (int32_t i = s->begin; i < s->end; ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        const auto * buffer = node->view_src ? node->view_src->buffer : node->buffer;
        if (buffer && !ggml_backend_buffer_is_host(const_cast<ggml_backend_buffer *>(buffer))) {
            return 0;
        }
    }

    for (int32_t i = s->begin; i < s->end; ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->flags & GGML_TENSOR_FLAG_COMPUTE) {
            node->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
            left_out.push_back(node);
        }
    }

    return s->n_left;
}

bool llama_loop_input::is_idle(const ggml_tensor * node) const {
    for (const auto & s : spans) {
        for (int32_t i = s.begin; s.halted && i < s.end; ++i) {
            if (ggml_graph_node(gf, i) == node) {
                return true;
            }
        }
    }

    return false;
}

//
// llama_loop_watch
//

bool llama_loop_watch::eval(ggml_tensor * t, bool ask, void * data) {
    auto & watch = *static_cast<llama_loop_watch *>(data);

    const bool is_step = strncmp(t->name, "loop_step-", 10) == 0;

    state s = {};
    const bool is_state = watch.trace && sscanf(t->name, "loop_state-%d-%d", &s.il, &s.evaluation) == 2;

    // the nodes of evaluations that are left out hold nothing
    if ((!is_step && !is_state) || (t->flags & GGML_TENSOR_FLAG_COMPUTE) == 0) {
        return !ask;
    }
    if (ask) {
        return true;
    }

    if (is_step) {
        float margin = 0.0f;
        ggml_backend_tensor_get(t, &margin, 0, sizeof(margin));

        if (margin > 0.0f && watch.input) {
            watch.n_skipped += watch.input->halt(t);
        }
    }

    if (is_state && !(watch.input && watch.input->is_idle(t))) {
        std::copy(t->ne, t->ne + GGML_MAX_DIMS, s.ne);
        s.data.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, s.data.data(), 0, ggml_nbytes(t));
        watch.states.push_back(std::move(s));
    }

    return true;
}
