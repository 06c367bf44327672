#include "llama-loop-impl.h"

#include "llama-loop-input.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-memory.h"

#include <algorithm>
#include <tuple>

//
// llama_loop_plan
//

uint32_t llama_loop_plan::n_layer_runs() const {
    return (n_eval - 1 + (kv == LLAMA_LOOP_KV_LAST))*(last - first);
}

uint32_t llama_loop_plan::n_nodes() const {
    uint32_t res = 0;

    // each unit: a residual per evaluation, at most a scale and an add per weight, and what halting needs
    for (const auto & row : rows) {
        res += 1 + 2*row.size() + (halt > 0.0 ? 24 : 0);
    }

    // writes to the memory that wait for the end of the unit, with their views and casts, and masks
    res = res*n_units() + 24*n_slot*(last - first) + 16;

    // states
    return watch && watch->trace ? res + n_layer + n_layer_runs() + 2*n_units()*n_eval : res;
}

bool llama_loop_plan::fits(const llama_loop_plan & other) const {
    // any graph that passes through the window once passes through it several times
    return first == other.first && last == other.last && mode == other.mode && kv == other.kv && n_slot == other.n_slot &&
        n_layer_runs() <= other.n_layer_runs() && n_nodes() <= other.n_nodes();
}

//
// llama_loop_graph
//

llama_loop_graph::llama_loop_graph(
        llama_loop_plan_ptr plan, const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf, llm_graph_result * res) :
    plan(std::move(plan)), mctx(mctx), ctx(ctx), gf(gf), res(res) {
}

llama_loop_graph::~llama_loop_graph() {
    if (plan && mctx) {
        mctx->set_loop(nullptr);
    }
}

llama_loop_input & llama_loop_graph::inputs() {
    if (!input) {
        input = static_cast<llama_loop_input *>(res->add_input(std::make_unique<llama_loop_input>(plan, gf)));
    }

    return *input;
}

ggml_tensor * llama_loop_graph::advance(ggml_tensor * cur, int & il) {
    if (!plan) {
        return cur;
    }

    if (plan->is_lens()) {
        return lens(cur, il);
    }

    if (is_skipped()) {
        const auto & given = *plan->given;

        ggml_tensor * left = inputs().given(ctx, cur, given.left);
        enter_window(inputs().given(ctx, cur, given.entered));
        il = unit_last - 1;

        return evaluated(left, il);
    }

    if (phase != RERUN) {
        trace(cur, il, phase == INSIDE ? g.size() + 1 : 1);
    }

    if (plan->n_eval > 0 && phase == BEFORE && il == plan->first - 1) {
        return enter_window(cur);
    }

    if (il != unit_last - 1 || (phase != INSIDE && phase != RERUN)) {
        return cur;
    }

    if (phase == RERUN) {
        // everything the run stores is in the graph by now; the state it computed is not needed
        return leave_unit(result);
    }

    return evaluated(cur, il);
}

// the state that an evaluation of the unit ended with; returns what goes on
ggml_tensor * llama_loop_graph::evaluated(ggml_tensor * cur, int & il) {
    g.push_back(cur);
    f.push_back(nullptr);
    ggml_build_forward_expand(gf, cur);

    n_attended = 0;

    cur = combine(plan->rows[g.size()]);
    if (plan->halt > 0.0) {
        cur = halt(cur);
    }

    if ((int32_t) g.size() < plan->n_eval) {
        y.push_back(cur);
        il = unit_first - 1;
        trace(cur, il, g.size() + 1);
        return cur;
    }

    if (plan->n_eval > 1) {
        trace(cur, il, g.size() + 1);
    }

    // without a memory there is nothing to store
    if (plan->kv == LLAMA_LOOP_KV_LAST && plan->n_eval > 1 && mctx) {
        result = cur;
        phase  = RERUN;
        il     = unit_first - 1;
        return cur;
    }

    return leave_unit(cur);
}

ggml_tensor * llama_loop_graph::enter_window(ggml_tensor * cur) {
    if (mctx) {
        mctx->set_loop(this);
    }

    unit_first = plan->first;
    unit_last  = plan->mode == LLAMA_LOOP_MODE_LAYER ? plan->first + 1 : plan->last;

    return enter_unit(cur);
}

ggml_tensor * llama_loop_graph::enter_unit(ggml_tensor * cur) {
    phase = INSIDE;
    alive = nullptr;
    held  = nullptr;

    y.assign(1, cur);
    g.clear();
    f.clear();
    readers.clear();

    n_attended = 0;

    return cur;
}

ggml_tensor * llama_loop_graph::leave_unit(ggml_tensor * cur) {
    // all reads of the rows come before they are written again
    ggml_build_forward_expand(gf, cur);

    for (auto * node : pending) {
        ggml_build_forward_expand(gf, node);
    }
    pending.clear();

    check_restored();

    if (unit_last < plan->last) {
        unit_first = unit_last;
        unit_last++;

        return enter_unit(cur);
    }

    phase = DONE;
    if (mctx) {
        mctx->set_loop(nullptr);
    }

    return cur;
}

// what evaluation i moved its input by; a node only where a row uses it
ggml_tensor * llama_loop_graph::residual(size_t i) {
    if (!f[i]) {
        f[i] = ggml_sub(ctx, g[i], y[i]);
        ggml_format_name(f[i], "loop_res-%d", (int) i + 1);
    }

    return f[i];
}

// x_0 + sum_j row[j] f_j, starting from the known state that needs the fewest additions: an input (row of A) or a
// result (row of A plus one). This makes undamped steps exact, g instead of y + (g - y), and euler steps incremental.
ggml_tensor * llama_loop_graph::combine(const std::vector<double> & row) {
    ggml_tensor * best = nullptr;
    size_t n_best = SIZE_MAX;
    std::vector<double> rest;

    std::vector<double> diff(row.size());
    for (size_t i = 0; i < y.size(); ++i) {
        for (int is_result = 0; is_result < 2; ++is_result) {
            const auto & base = plan->rows[i];
            for (size_t j = 0; j < row.size(); ++j) {
                diff[j] = row[j] - (j < base.size() ? base[j] : 0.0) - (is_result && j == i ? 1.0 : 0.0);
            }

            const size_t n = std::count_if(diff.begin(), diff.end(), [](double d) { return d != 0.0; });
            if (n < n_best) {
                n_best = n;
                best   = is_result ? g[i] : y[i];
                rest   = diff;
            }
        }
    }

    ggml_tensor * cur = best;
    for (size_t j = 0; j < rest.size(); ++j) {
        if (rest[j] != 0.0) {
            cur = ggml_add(ctx, cur, rest[j] == 1.0 ? residual(j) : ggml_scale(ctx, residual(j), (float) rest[j]));
        }
    }

    return cur;
}

// [n_embd, n_tokens, n_streams] -> [1, n_tokens]
ggml_tensor * llama_loop_graph::sum_by_token(ggml_tensor * cur) const {
    const int64_t n_tokens = cur->ne[1];

    cur = ggml_sum_rows(ctx, cur);

    if (ggml_nelements(cur) > n_tokens) {
        cur = ggml_reshape_2d(ctx, cur, n_tokens, ggml_nelements(cur)/n_tokens);
        cur = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, cur)));
    }

    return cur;
}

// Once a step is smaller than the threshold, the state stays what it is. That is so in the graph itself, on any device;
// the evaluations that change nothing any more are then left out where that is possible. For that the state is kept in
// one place, which a copy that is not computed leaves alone.
ggml_tensor * llama_loop_graph::halt(ggml_tensor * next) {
    const int32_t n = g.size();

    ggml_tensor * cur = next;
    if (alive) {
        ggml_tensor * halted = ggml_scale_bias(ctx, alive, -1.0f, 1.0f);
        cur = ggml_add(ctx, ggml_mul(ctx, cur, alive), ggml_mul(ctx, y.back(), halted));
    }

    ggml_tensor * margin = nullptr;
    if (n < plan->n_eval) {
        // of each token, because the state of the first one is often longer than all others together
        ggml_tensor * moved = ggml_sqrt(ctx, ggml_div(ctx,
                sum_by_token(ggml_sqr(ctx, ggml_sub(ctx, next, y.back()))),
                sum_by_token(ggml_sqr(ctx, y.back()))));
        ggml_tensor * step  = ggml_scale(ctx, ggml_sum(ctx, moved), 1.0f/ggml_nelements(moved));

        margin = ggml_scale_bias(ctx, step, -1.0f, (float) plan->halt);
        ggml_format_name(margin, "loop_step-%d", n);

        ggml_tensor * goes_on = ggml_scale_bias(ctx, ggml_step(ctx, margin), -1.0f, 1.0f);
        alive = alive ? ggml_mul(ctx, alive, goes_on) : goes_on;
        ggml_build_forward_expand(gf, alive);
    }

    held = held ? ggml_cpy(ctx, cur, held) : ggml_cont(ctx, cur);
    ggml_build_forward_expand(gf, held);

    if (margin) {
        inputs().begin_halt(margin, plan->n_eval - n);
    } else {
        inputs().end_halts();
    }

    return held;
}

ggml_tensor * llama_loop_graph::lens(ggml_tensor * cur, int & il) {
    if (phase == DONE) {
        return cur;
    }

    phase = DONE;
    il    = plan->n_layer - 1; // the last layer too is left out, and with it the choice of rows for the output

    return inputs().given(ctx, cur, plan->given->entered);
}

void llama_loop_graph::trace(ggml_tensor * cur, int il, size_t evaluation) {
    if (!plan->watch || !plan->watch->trace) {
        return;
    }

    inputs();

    // under a name of its own: the builder names the node itself after this
    ggml_tensor * state = ggml_reshape(ctx, ggml_is_contiguous(cur) ? cur : ggml_cont(ctx, cur), cur);
    ggml_format_name(state, "loop_state-%d-%d", il, (int) evaluation);
    ggml_build_forward_expand(gf, state);
}

//
// memory
//

bool llama_loop_graph::stores_nothing() const {
    return plan && plan->kv == LLAMA_LOOP_KV_FROZEN && phase == INSIDE && !g.empty();
}

void llama_loop_graph::expand_kv(ggml_tensor * kv) const {
    if (!stores_nothing() && !is_skipped()) {
        ggml_build_forward_expand(gf, kv);
    }
}

ggml_tensor * llama_loop_graph::read(const llama_kv_cache * kv, const std::function<ggml_tensor * (uint32_t slot)> & view) {
    kv_last = kv;

    ggml_tensor * res = view(plan->kv == LLAMA_LOOP_KV_EACH ? g.size() : 0);

    auto & reader = readers[res->view_src];
    reader = std::max(reader, n_attended);

    return res;
}

ggml_tensor * llama_loop_graph::store(
        ggml_tensor * cur,
        const std::function<ggml_tensor * (ggml_tensor * cur, uint32_t slot)> & write,
        const std::function<ggml_tensor * (uint32_t slot)> & view) {
    if (stores_nothing()) {
        return view(0);
    }

    if (plan->n_eval == 1) {
        for (int32_t s = 1; s < plan->n_slot; ++s) {
            pending.push_back(write(cur, s));
        }
    } else if (plan->kv == LLAMA_LOOP_KV_FIRST && g.empty()) {
        // later evaluations put their own K/V into these rows; this one comes back when they are done
        const ggml_type type = view(0)->type;

        if (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
            // kept as the cache would keep it: half the memory, the same bits
            ggml_tensor * kept = ggml_cast(ctx, cur, type);
            ggml_build_forward_expand(gf, kept);
            pending.push_back(write(ggml_cast(ctx, kept, GGML_TYPE_F32), 0));
        } else {
            pending.push_back(write(cur, 0));
        }
    }

    return write(cur, plan->kv == LLAMA_LOOP_KV_EACH ? g.size() : 0);
}

// In the last evaluation the K/V of the first one comes back as soon as no attention of this unit reads these rows any more:
// next to the layer they belong to, and so on the device of that layer. Not with halt, which may leave this evaluation out.
void llama_loop_graph::attended() {
    if (!plan || phase != INSIDE) {
        return;
    }

    const int n = n_attended++;

    if (plan->kv != LLAMA_LOOP_KV_FIRST || plan->halt > 0.0 || (int32_t) g.size() + 1 < plan->n_eval || plan->n_eval < 2) {
        return;
    }

    const auto is_read_later = [&](const ggml_tensor * node) {
        const auto it = readers.find(node->view_src);
        return states.count(node->view_src) || it == readers.end() || it->second != n;
    };

    const auto done = std::stable_partition(pending.begin(), pending.end(), is_read_later);
    if (restored.empty()) {
        i_restored = ggml_graph_n_nodes(gf);
    }
    for (auto it = done; it != pending.end(); ++it) {
        ggml_build_forward_expand(gf, *it);
        restored.insert(*it);
    }
    pending.erase(done, pending.end());
}

// What attended() takes for granted: nothing else in the unit reads K/V that came back early.
void llama_loop_graph::check_restored() {
    std::set<const ggml_tensor *> back;

    for (int32_t i = i_restored; !restored.empty() && i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        if (restored.count(node)) {
            back.insert(node->view_src);
            continue;
        }
        for (const ggml_tensor * src : node->src) {
            if (src && back.count(src->view_src ? src->view_src : src)) {
                throw llama_loop_unreached("the graph reads K/V that the loop has put back already");
            }
        }
    }
    restored.clear();
}

void llama_loop_graph::no_cache(int il, ggml_tensor *& k, ggml_tensor *& v) {
    if (!plan || plan->kv != LLAMA_LOOP_KV_FROZEN || phase != INSIDE) {
        return;
    }

    if (g.empty()) {
        kvs[il] = { k, v };
    } else {
        std::tie(k, v) = kvs.at(il);
    }
}

// Recurrent state. With kv = each every evaluation has its own. With kv = first every evaluation starts from the state
// as it was before the ubatch, so what the first one leaves behind is written only when the unit ends, and what the
// later ones would write is dropped.

ggml_tensor * llama_loop_graph::state(const std::vector<ggml_tensor *> & tensors, int il) {
    const size_t slot = plan->kv == LLAMA_LOOP_KV_EACH ? g.size() : 0;
    const size_t i    = slot == 0 ? il : plan->n_layer + (slot - 1)*(plan->last - plan->first) + il - plan->first;

    // a plan is tried before it gets its slots: those that are there may be another's
    ggml_tensor * s = i < tensors.size() && tensors[i] ? tensors[i] : tensors[il];

    states.insert(s);

    return s;
}

void llama_loop_graph::expand(ggml_tensor * node) {
    if (is_skipped()) {
        return;
    }

    const bool is_write = (phase == INSIDE || phase == RERUN) && node->view_src && states.count(node->view_src) &&
        (node->op == GGML_OP_CPY || node->op == GGML_OP_SCALE);

    if (!is_write) {
        ggml_build_forward_expand(gf, node);
        return;
    }

    const bool is_zeroing = node->op == GGML_OP_SCALE; // of a cell that a new sequence takes

    if (plan->kv != LLAMA_LOOP_KV_FIRST || plan->n_eval < 2 || (is_zeroing && g.empty())) {
        written.insert(node);
        ggml_build_forward_expand(gf, node);
        return;
    }

    if (!g.empty()) {
        return;
    }

    // A copy of its own, so that no larger tensor is kept alive, and so that no backend fuses the operation with this
    // write and leaves its result unwritten.
    ggml_tensor * src = node->src[0]->view_src ? ggml_cont(ctx, node->src[0]) : node->src[0];
    ggml_build_forward_expand(gf, src);

    pending.push_back(ggml_cpy(ctx, src, node->src[1]));
    written.insert(pending.back());
}

//
// experts and attention
//

void llama_loop_graph::route(const ggml_tensor * id, ggml_tensor *& experts, ggml_tensor *& weights) {
    if (!plan || plan->routing != LLAMA_LOOP_ROUTING_FROZEN || (phase != INSIDE && phase != RERUN)) {
        return;
    }

    if (!is_later()) {
        routes[id] = { experts, weights };
    } else {
        std::tie(experts, weights) = routes.at(id);
    }
}

ggml_tensor * llama_loop_graph::attention(ggml_tensor * kq_mask) {
    if (!plan || plan->attention == 0 || plan->n_eval < 2 || !kq_mask || (phase != INSIDE && phase != RERUN)) {
        return kq_mask;
    }

    // in the graph from the first evaluation on, because halting may leave out the second
    auto & masked = masks[kq_mask];
    if (!masked) {
        masked = ggml_add(ctx, kq_mask, inputs().limit(ctx, kq_mask, kv_last));
        ggml_build_forward_expand(gf, masked);
    }

    return is_later() ? masked : kq_mask;
}

void llama_loop_graph::finish(const char * arch_name) {
    if (!plan) {
        return;
    }

    if (plan->given) {
        // inputs of the layers left out are set all the same, so they need a place
        for (auto * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->flags & GGML_TENSOR_FLAG_INPUT) {
                ggml_build_forward_expand(gf, t);
            }
        }
    }
    if (plan->is_lens()) {
        return;
    }

    if (plan->n_eval > 0 && phase != DONE) {
        throw llama_loop_unreached(format("the graph of architecture '%s' does not pass through the loop window [%d, %d)",
                    arch_name, plan->first, plan->last));
    }

    if (states.empty()) {
        return;
    }

    for (int32_t i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        const bool is_write = node->op == GGML_OP_CPY || node->op == GGML_OP_SCALE || node->op == GGML_OP_SET_ROWS;
        if (is_write && node->view_src && states.count(node->view_src) && !written.count(node)) {
            throw llama_loop_unreached(format("the graph of architecture '%s' writes recurrent state past the loop",
                        arch_name));
        }
    }
}
