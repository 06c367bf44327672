#include "llama-loop.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory.h"
#include "llama-model.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

#ifndef GGUFLOOP_PATCH_ID
#error "GGUFLOOP_PATCH_ID is set by the CMake hook"
#endif

// a graph was built in which the window never opened or never closed
struct llama_loop_unreached : std::runtime_error {
    using std::runtime_error::runtime_error;
};

//
// llama_loop_plan
//

uint32_t llama_loop_plan::n_layer_runs() const {
    return (n_eval - 1 + (kv == LLAMA_LOOP_KV_LAST))*(last - first);
}

uint32_t llama_loop_plan::n_nodes() const {
    uint32_t res = 0;

    // each unit: a residual per evaluation, and at most a scale and an add per weight
    for (const auto & row : rows) {
        res += 1 + 2*row.size();
    }

    // K/V writes that wait for the end of the unit, with their views
    return res*n_units() + 16*n_slot*(last - first);
}

//
// llama_loop_graph
//

llama_loop_graph::llama_loop_graph(
        llama_loop_plan_ptr plan, const llama_memory_context_i * mctx, ggml_context * ctx, ggml_cgraph * gf) :
    plan(std::move(plan)), mctx(mctx), ctx(ctx), gf(gf) {
}

llama_loop_graph::~llama_loop_graph() {
    if (plan && mctx) {
        mctx->set_loop(nullptr);
    }
}

ggml_tensor * llama_loop_graph::advance(ggml_tensor * cur, int & il) {
    if (!plan) {
        return cur;
    }

    if (phase == BEFORE && il == plan->first - 1) {
        if (mctx) {
            mctx->set_loop(this);
        }

        unit_first = plan->first;
        unit_last  = plan->mode == LLAMA_LOOP_MODE_LAYER ? plan->first + 1 : plan->last;

        return enter_unit(cur);
    }

    if (il != unit_last - 1 || (phase != INSIDE && phase != RERUN)) {
        return cur;
    }

    if (phase == RERUN) {
        // everything the run stores is in the graph by now; the state it computed is not needed
        return leave_unit(result);
    }

    g.push_back(cur);
    f.push_back(ggml_sub(ctx, cur, y.back()));
    ggml_format_name(f.back(), "loop_res-%d", (int) f.size());
    ggml_build_forward_expand(gf, f.back());

    cur = combine(plan->rows[f.size()]);

    if ((int32_t) f.size() < plan->n_eval) {
        y.push_back(cur);
        il = unit_first - 1;
        return cur;
    }

    if (plan->kv == LLAMA_LOOP_KV_LAST && plan->n_eval > 1) {
        result = cur;
        phase  = RERUN;
        il     = unit_first - 1;
        return cur;
    }

    return leave_unit(cur);
}

ggml_tensor * llama_loop_graph::enter_unit(ggml_tensor * cur) {
    phase = INSIDE;

    y.assign(1, cur);
    g.clear();
    f.clear();

    return cur;
}

ggml_tensor * llama_loop_graph::leave_unit(ggml_tensor * cur) {
    // all reads of the K/V rows come before the rows are written again
    ggml_build_forward_expand(gf, cur);

    for (auto * node : pending) {
        ggml_build_forward_expand(gf, node);
    }
    pending.clear();

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

// x_0 + sum_j row[j] f_j, starting from the known state that needs the fewest additions: an input (row of A) or a
// result (row of A plus one). This makes undamped steps exact, g instead of y + (g - y), and euler steps incremental.
ggml_tensor * llama_loop_graph::combine(const std::vector<double> & row) const {
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
            cur = ggml_add(ctx, cur, rest[j] == 1.0 ? f[j] : ggml_scale(ctx, f[j], (float) rest[j]));
        }
    }

    return cur;
}

bool llama_loop_graph::stores_nothing() const {
    return plan && plan->kv == LLAMA_LOOP_KV_FROZEN && phase == INSIDE && !f.empty();
}

void llama_loop_graph::expand_kv(ggml_tensor * kv) const {
    if (!stores_nothing()) {
        ggml_build_forward_expand(gf, kv);
    }
}

uint32_t llama_loop_graph::slot() const {
    return plan->kv == LLAMA_LOOP_KV_EACH ? f.size() : 0;
}

ggml_tensor * llama_loop_graph::store(
        const std::function<ggml_tensor * (uint32_t slot)> & write,
        const std::function<ggml_tensor * ()> & read) {
    if (stores_nothing()) {
        return read();
    }

    if (plan->n_eval == 1) {
        for (int32_t s = 1; s < plan->n_slot; ++s) {
            pending.push_back(write(s));
        }
    } else if (plan->kv == LLAMA_LOOP_KV_FIRST && f.empty()) {
        // later evaluations put their own K/V into these rows; this one comes back when they are done
        pending.push_back(write(0));
    }

    return write(slot());
}

void llama_loop_graph::finish(const char * arch_name) const {
    if (plan && phase != DONE) {
        throw llama_loop_unreached(format("the graph of architecture '%s' does not pass through the loop window [%d, %d)",
                    arch_name, plan->first, plan->last));
    }
}

//
// K/V slots
//

int32_t llama_kv_cache::loop_layer(int32_t il, uint32_t slot) const {
    const int32_t ikv = map_layer_ids.at(il);

    if (slot > 0) {
        // keyed by the cache layer, so that a model layer that reuses another's K/V finds the same slots
        const auto it = loop_layers.find({ ikv, slot });
        if (it != loop_layers.end()) {
            return it->second;
        }
    }

    return ikv;
}

// a memory that does not know loops would keep the K/V of whichever evaluation wrote last
int32_t llama_memory_i::loop_reserve(int32_t /*first*/, int32_t /*last*/, uint32_t n_slot) {
    return n_slot == 0 ? LLAMA_LOOP_OK : LLAMA_LOOP_ERR_MEMORY;
}

int32_t llama_kv_cache_iswa::loop_reserve(int32_t first, int32_t last, uint32_t n_slot) {
    const int32_t res = kv_base->loop_reserve(first, last, n_slot);

    return res == LLAMA_LOOP_OK ? kv_swa->loop_reserve(first, last, n_slot) : res;
}

int32_t llama_kv_cache::loop_reserve(int32_t first, int32_t last, uint32_t n_slot) {
    if (!loop_layers.empty()) {
        layers.resize(layers.size() - loop_layers.size());
        ctxs_bufs.erase(ctxs_bufs.end() - n_loop_bufs, ctxs_bufs.end());
        loop_layers.clear();
        n_loop_bufs = 0;
    }

    if (n_slot <= 1) {
        return LLAMA_LOOP_OK;
    }

    if (other) {
        return LLAMA_LOOP_ERR_MEMORY;
    }

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;
    std::vector<std::pair<std::pair<int32_t, uint32_t>, kv_layer>> added;

    const size_t n_base = layers.size();

    for (uint32_t slot = 1; slot < n_slot; ++slot) {
        for (size_t ikv = 0; ikv < n_base; ++ikv) {
            const auto & base = layers[ikv];
            if ((int32_t) base.il < first || (int32_t) base.il >= last) {
                continue;
            }

            auto & ctx_buf = ctx_map[ggml_backend_buffer_get_type(base.k->buffer)];
            if (!ctx_buf) {
                const size_t n_tensors = 2u*(1 + n_stream)*(last - first)*(n_slot - 1);

                ggml_init_params params = {
                    /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
                    /*.mem_buffer =*/ NULL,
                    /*.no_alloc   =*/ true,
                };
                ctx_buf.reset(ggml_init(params));
                if (!ctx_buf) {
                    return LLAMA_LOOP_ERR_ALLOC;
                }
            }

            kv_layer layer = { base.il, nullptr, nullptr, {}, {} };

            const auto duplicate = [&](ggml_tensor * src, std::vector<ggml_tensor *> & streams) {
                ggml_tensor * t = src ? ggml_dup_tensor(ctx_buf.get(), src) : nullptr;
                if (t) {
                    ggml_format_name(t, "%s_p%u", src->name, slot);
                }
                for (uint32_t s = 0; s < n_stream; ++s) {
                    streams.push_back(t ? ggml_view_2d(ctx_buf.get(), t, t->ne[0], t->ne[1], t->nb[1], s*t->nb[2]) : nullptr);
                }
                return t;
            };

            layer.k = duplicate(base.k, layer.k_stream);
            layer.v = duplicate(base.v, layer.v_stream);

            added.push_back({ { (int32_t) ikv, slot }, std::move(layer) });
        }
    }

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
    for (auto & [buft, ctx_buf] : ctx_map) {
        ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx_buf.get(), buft) };
        if (!buf) {
            return LLAMA_LOOP_ERR_ALLOC;
        }
        // masked rows are read too, and zero times garbage may be NaN
        ggml_backend_buffer_clear(buf.get(), 0);
        bufs.emplace_back(std::move(ctx_buf), std::move(buf));
    }

    for (auto & [key, layer] : added) {
        loop_layers[key] = layers.size();
        layers.push_back(std::move(layer));
    }

    n_loop_bufs = bufs.size();
    std::move(bufs.begin(), bufs.end(), std::back_inserter(ctxs_bufs));

    return LLAMA_LOOP_OK;
}

//
// llama_context
//

int32_t llama_context::loop_set(llama_loop_plan_ptr plan) {
    int32_t res = LLAMA_LOOP_OK;

    try {
        synchronize();

        if (memory) {
            const auto n_slot = [](const llama_loop_plan_ptr & p) { return p ? p->n_slot : 1; };

            if (n_slot(plan) > 1 || n_slot(loop_plan) > 1) {
                memory->clear(true);
            }

            if (plan) {
                res = memory->loop_reserve(plan->first, plan->last, plan->n_slot);
            }
            if (!plan || res != LLAMA_LOOP_OK) {
                memory->loop_reserve(0, 0, 0);
            }
        } else if (plan) {
            // without a memory, decoding takes the path of encoders, whose graphs have no plan
            res = LLAMA_LOOP_ERR_MEMORY;
        }

        if (res != LLAMA_LOOP_OK) {
            plan.reset();
        }

        cparams.loop = plan;

        loop_plan = std::move(plan);
        loop_plan_off.reset();

        // a plan may need more nodes and buffers than were reserved, and graphs kept for reuse may point at slots that
        // are gone; without a plan the buffers shrink again
        sched_need_reserve = true;

        sched_reserve();
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());

        if (loop_plan) {
            loop_set(nullptr);
        }

        return dynamic_cast<const llama_loop_unreached *>(&e) ? LLAMA_LOOP_ERR_ARCH : LLAMA_LOOP_ERR_ALLOC;
    }

    return res;
}

void llama_context::loop_enable(bool enable) {
    if (!loop_plan) {
        return;
    }

    if (enable) {
        cparams.loop = loop_plan;
        return;
    }

    if (loop_plan->n_slot == 1) {
        cparams.loop.reset();
        return;
    }

    if (!loop_plan_off) {
        auto off = std::make_shared<llama_loop_plan>(*loop_plan);
        off->n_eval = 1;
        off->mode   = LLAMA_LOOP_MODE_BLOCK;
        off->rows   = { {}, { 1.0 } };
        loop_plan_off = off;
    }
    cparams.loop = loop_plan_off;
}

size_t llama_context::loop_memory_size() const {
    size_t res = 0;

    if (memory) {
        for (const auto & [_, size] : memory->memory_breakdown()) {
            res += size;
        }
    }

    return res;
}

//
// C interface
//

int32_t llama_loop_abi(void) {
    return LLAMA_LOOP_ABI;
}

const char * llama_loop_patch_id(void) {
    return GGUFLOOP_PATCH_ID;
}

static int32_t llama_loop_plan_init(
        const llama_model     & model,
              int32_t           first,
              int32_t           last,
              int32_t           n_eval,
         const double         * A,
         const double         * B,
              int32_t           mode,
              int32_t           kv,
              llama_loop_plan & plan) {
    const auto & hparams = model.hparams;

    if (first < 1 || first >= last || last > (int32_t) hparams.n_layer() - 1) {
        return LLAMA_LOOP_ERR_WINDOW;
    }

    if (n_eval < 1 || n_eval > LLAMA_LOOP_MAX_EVALS || !A || !B ||
            mode < LLAMA_LOOP_MODE_BLOCK || mode > LLAMA_LOOP_MODE_LAYER ||
            kv   < LLAMA_LOOP_KV_FIRST   || kv   > LLAMA_LOOP_KV_FROZEN) {
        return LLAMA_LOOP_ERR_PLAN;
    }

    plan.first  = first;
    plan.last   = last;
    plan.n_eval = n_eval;
    plan.mode   = (llama_loop_mode) mode;
    plan.kv     = (llama_loop_kv)   kv;
    plan.n_slot = kv == LLAMA_LOOP_KV_EACH ? n_eval : 1;

    for (int32_t i = 0; i < n_eval; ++i) {
        for (int32_t j = 0; j < n_eval; ++j) {
            const double a = A[i*n_eval + j];
            if (!std::isfinite(a) || (j >= i && a != 0.0)) {
                return LLAMA_LOOP_ERR_PLAN;
            }
        }
        if (!std::isfinite(B[i])) {
            return LLAMA_LOOP_ERR_PLAN;
        }
        plan.rows.emplace_back(A + i*n_eval, A + i*n_eval + i);
    }
    plan.rows.emplace_back(B, B + n_eval);

    // the graphs of encoders and of models with an encoder are other windows than the caller means
    if (llama_model_has_encoder(&model)) {
        return LLAMA_LOOP_ERR_ARCH;
    }

    for (int32_t il = first; il < last; ++il) {
        if (hparams.is_recr(il)) {
            return LLAMA_LOOP_ERR_RECURRENT;
        }
    }

    return LLAMA_LOOP_OK;
}

int32_t llama_loop_set(
        llama_context * ctx,
              int32_t   first,
              int32_t   last,
              int32_t   n_eval,
         const double * A,
         const double * B,
              int32_t   mode,
              int32_t   kv) {
    if (n_eval == 0) {
        return ctx->loop_set(nullptr);
    }

    auto plan = std::make_shared<llama_loop_plan>();

    const int32_t res = llama_loop_plan_init(ctx->get_model(), first, last, n_eval, A, B, mode, kv, *plan);
    if (res != LLAMA_LOOP_OK) {
        ctx->loop_set(nullptr);
        return res;
    }

    return ctx->loop_set(std::move(plan));
}

void llama_loop_enable(llama_context * ctx, bool enable) {
    ctx->loop_enable(enable);
}

size_t llama_loop_memory_size(const llama_context * ctx) {
    return ctx->loop_memory_size();
}
