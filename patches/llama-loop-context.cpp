#include "llama-loop.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>

#ifndef GGUFLOOP_PATCH_ID
#error "GGUFLOOP_PATCH_ID is set by the CMake hook"
#endif

//
// llama_context
//

// the plan of the next graphs, from what was set and what is switched on
void llama_context::loop_apply() {
    llama_loop_plan_ptr plan = loop_plan;

    if (plan && !loop_enabled) {
        plan = nullptr;

        if (loop_plan->n_slot > 1) {
            if (!loop_plan_off) {
                auto off = std::make_shared<llama_loop_plan>(*loop_plan);
                off->n_eval = 1;
                off->mode   = LLAMA_LOOP_MODE_BLOCK;
                off->halt   = 0.0;
                off->rows   = { {}, { 1.0 } };
                loop_plan_off = off;
            }
            plan = loop_plan_off;
        }
    }

    if (loop_trace_on || loop_lens_state) {
        auto watched = plan ? std::make_shared<llama_loop_plan>(*plan) : std::make_shared<llama_loop_plan>();
        watched->n_layer = model.hparams.n_layer();
        watched->watch   = loop_watch;
        watched->lens    = loop_lens_state;
        plan = watched;
    }

    cparams.loop = plan;

    // the callback goes to the scheduler when a graph is built, and another plan is another graph
    const bool watching = plan && plan->watch && !plan->lens && (plan->watch->trace || plan->halt > 0.0);

    cparams.cb_eval           = watching ? llama_loop_watch::eval : loop_cb_eval;
    cparams.cb_eval_user_data = watching ? plan->watch.get()      : loop_cb_eval_user_data;
}

uint32_t llama_context::loop_max_nodes(uint32_t n_nodes) const {
    uint32_t res = n_nodes;

    if (loop_plan) {
        res += (uint64_t) n_nodes*loop_plan->n_layer_runs()/model.hparams.n_layer() + loop_plan->n_nodes();
    }
    if (loop_trace_on) {
        res += 2*(model.hparams.n_layer() + (loop_plan ? loop_plan->n_layer_runs() : 0) + 2*LLAMA_LOOP_MAX_EVALS);
    }

    return res;
}

int32_t llama_context::loop_set(llama_loop_plan_ptr plan) {
    int32_t res = LLAMA_LOOP_OK;

    try {
        synchronize();

        if (plan && plan->halt > 0.0) {
            auto watched = std::make_shared<llama_loop_plan>(*plan);
            watched->watch = loop_watch;
            plan = watched;
        }

        const auto n_slot = [](const llama_loop_plan_ptr & p) { return p ? p->n_slot : 1; };

        const bool same_slots = n_slot(plan) == 1 && n_slot(loop_plan) == 1;
        // any graph that passes through the window once passes through it several times
        const bool same_path  = plan && loop_plan && plan->first == loop_plan->first && plan->last == loop_plan->last &&
                                plan->mode == loop_plan->mode && (plan->kv == loop_plan->kv);

        if (memory) {
            if (!same_slots) {
                memory->clear(true);
            }
            if (plan) {
                res = memory->loop_reserve(plan->first, plan->last, plan->n_slot);
            }
            if (!plan || res != LLAMA_LOOP_OK) {
                memory->loop_reserve(0, 0, 0);
            }
        }

        if (res != LLAMA_LOOP_OK) {
            plan.reset();
        }

        const bool fits = same_slots && same_path && plan && plan->n_layer_runs() <= loop_runs_reserved &&
                          plan->n_nodes() <= loop_nodes_reserved;

        loop_plan    = std::move(plan);
        loop_enabled = true;
        loop_plan_off.reset();
        loop_watch->n_skipped = 0;
        loop_apply();

        if (fits) {
            return res;
        }

        // a plan may need more nodes and buffers than were reserved, and graphs kept for reuse may point at slots that
        // are gone; without a plan the buffers shrink again
        loop_runs_reserved  = loop_plan ? loop_plan->n_layer_runs() : 0;
        loop_nodes_reserved = loop_plan ? loop_plan->n_nodes()      : 0;
        sched_need_reserve  = true;

        sched_reserve();
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());

        sched_need_reserve = true; // what was reserved is gone

        if (loop_plan) {
            loop_set(nullptr);
        }

        return dynamic_cast<const llama_loop_unreached *>(&e) ? LLAMA_LOOP_ERR_ARCH : LLAMA_LOOP_ERR_ALLOC;
    }

    return res;
}

void llama_context::loop_enable(bool enable) {
    if (loop_plan && enable != loop_enabled) {
        loop_enabled = enable;
        loop_apply();
    }
}

void llama_context::loop_trace(bool enable) {
    loop_trace_on = loop_watch->trace = enable;
    loop_watch->states = {};
    if (enable) {
        sched_need_reserve = true;
    }
    loop_apply();
}

const llama_loop_watch & llama_context::loop_watched() const {
    return *loop_watch;
}

void llama_context::loop_lens(const float * state, size_t n) {
    loop_lens_state = state ? std::make_shared<std::vector<float>>(state, state + n) : nullptr;
    loop_apply();
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

// whether every stage is the one before it plus a multiple of that one's residual
static bool llama_loop_is_chain(const llama_loop_plan & plan) {
    for (size_t i = 1; i < plan.rows.size(); ++i) {
        for (size_t j = 0; j + 1 < i; ++j) {
            if (plan.rows[i][j] != plan.rows[i - 1][j]) {
                return false;
            }
        }
    }

    return true;
}

static int32_t llama_loop_plan_init(const llama_model & model, const llama_loop_params & params, llama_loop_plan & plan) {
    const auto & hparams = model.hparams;

    const int32_t n_layer = hparams.n_layer();
    const int32_t n_eval  = params.n_eval;

    if (params.first < 1 || params.first >= params.last || params.last > n_layer - 1) {
        return LLAMA_LOOP_ERR_WINDOW;
    }

    if (n_eval < 1 || n_eval > LLAMA_LOOP_MAX_EVALS || !params.A || !params.B ||
            params.mode    < LLAMA_LOOP_MODE_BLOCK   || params.mode    > LLAMA_LOOP_MODE_LAYER ||
            params.kv      < LLAMA_LOOP_KV_FIRST     || params.kv      > LLAMA_LOOP_KV_FROZEN  ||
            params.routing < LLAMA_LOOP_ROUTING_FREE || params.routing > LLAMA_LOOP_ROUTING_FROZEN ||
            params.attention < 0 || params.sinks < 0 || !(params.halt >= 0.0) || !std::isfinite(params.halt)) {
        return LLAMA_LOOP_ERR_PLAN;
    }

    plan.first     = params.first;
    plan.last      = params.last;
    plan.n_layer   = n_layer;
    plan.n_eval    = n_eval;
    plan.mode      = (llama_loop_mode)    params.mode;
    plan.kv        = (llama_loop_kv)      params.kv;
    plan.routing   = (llama_loop_routing) params.routing;
    plan.n_slot    = plan.kv == LLAMA_LOOP_KV_EACH ? n_eval : 1;
    plan.attention = params.attention;
    plan.sinks     = params.sinks;
    plan.halt      = params.halt;

    for (int32_t i = 0; i < n_eval; ++i) {
        const double * row = params.A + i*n_eval;
        for (int32_t j = 0; j < n_eval; ++j) {
            if (!std::isfinite(row[j]) || (j >= i && row[j] != 0.0)) {
                return LLAMA_LOOP_ERR_PLAN;
            }
        }
        if (!std::isfinite(params.B[i])) {
            return LLAMA_LOOP_ERR_PLAN;
        }
        plan.rows.emplace_back(row, row + i);
    }
    plan.rows.emplace_back(params.B, params.B + n_eval);

    if (plan.halt > 0.0 && (plan.kv == LLAMA_LOOP_KV_EACH || !llama_loop_is_chain(plan))) {
        return LLAMA_LOOP_ERR_PLAN;
    }

    // the graphs of encoders and of models with an encoder are other windows than the caller means
    if (llama_model_has_encoder(&model)) {
        return LLAMA_LOOP_ERR_ARCH;
    }

    for (int32_t il = plan.first; il < plan.last; ++il) {
        if (hparams.is_recr(il) && plan.kv != LLAMA_LOOP_KV_FIRST && plan.kv != LLAMA_LOOP_KV_EACH) {
            return LLAMA_LOOP_ERR_RECURRENT;
        }
    }

    return LLAMA_LOOP_OK;
}

int32_t llama_loop_set(llama_context * ctx, const llama_loop_params * params) {
    if (!params) {
        return ctx->loop_set(nullptr);
    }

    auto plan = std::make_shared<llama_loop_plan>();

    const int32_t res = llama_loop_plan_init(ctx->get_model(), *params, *plan);
    if (res != LLAMA_LOOP_OK) {
        ctx->loop_set(nullptr);
        return res;
    }

    return ctx->loop_set(std::move(plan));
}

void llama_loop_enable(llama_context * ctx, bool enable) {
    ctx->loop_enable(enable);
}

bool llama_loop_is_recurrent(const llama_context * ctx, int32_t il) {
    const auto & hparams = ctx->get_model().hparams;

    return il >= 0 && il < (int32_t) hparams.n_layer() && hparams.is_recr(il);
}

size_t llama_loop_memory_size(const llama_context * ctx) {
    return ctx->loop_memory_size();
}

int64_t llama_loop_skipped(const llama_context * ctx) {
    return ctx->loop_watched().n_skipped;
}

void llama_loop_trace(llama_context * ctx, bool enable) {
    ctx->loop_trace(enable);
}

int32_t llama_loop_trace_count(const llama_context * ctx) {
    return ctx->loop_watched().states.size();
}

const float * llama_loop_trace_get(const llama_context * ctx, int32_t i, int32_t * il, int32_t * evaluation, int64_t * ne) {
    const auto & states = ctx->loop_watched().states;

    if (i < 0 || (size_t) i >= states.size()) {
        return nullptr;
    }

    *il         = states[i].il;
    *evaluation = states[i].evaluation;
    std::copy(states[i].ne, states[i].ne + 4, ne);

    return states[i].data.data();
}

void llama_loop_lens(llama_context * ctx, const float * state, size_t n) {
    ctx->loop_lens(state, n);
}
