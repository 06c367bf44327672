#include "llama-loop-impl.h"

#include "llama-arch.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <tuple>

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

    if (loop_trace_on || loop_given) {
        auto watched = plan ? std::make_shared<llama_loop_plan>(*plan) : std::make_shared<llama_loop_plan>();
        watched->n_layer = model.hparams.n_layer();
        watched->watch   = loop_watch;
        watched->given   = loop_given;
        plan = watched;
    }

    cparams.loop = plan;

    // the callback goes to the scheduler when a graph is built, and another plan is another graph
    const bool watching = plan && plan->watch && !plan->is_lens() && (plan->watch->trace || plan->halt > 0.0);

    cparams.cb_eval           = watching ? llama_loop_watch::eval : loop_cb_eval;
    cparams.cb_eval_user_data = watching ? plan->watch.get()      : loop_cb_eval_user_data;
}

uint32_t llama_context::loop_max_nodes(uint32_t n_nodes) const {
    const uint32_t n_layer = model.hparams.n_layer();

    // room for every plan that was set so far, so that going back to one costs nothing
    uint32_t n_more = 0;
    const auto make_room = [&](const llama_loop_plan & plan) {
        n_more = std::max<uint64_t>(n_more, (uint64_t) n_nodes*plan.n_layer_runs()/n_layer + plan.n_nodes());
    };

    for (const auto & plan : loop_reserved) {
        make_room(*plan);
    }
    if (loop_plan) {
        make_room(*loop_plan);
    }
    if (loop_trace_on) {
        n_more += 2*(n_layer + (loop_plan ? loop_plan->n_layer_runs() : 0) + 2*LLAMA_LOOP_MAX_EVALS);
    }

    return n_nodes + n_more;
}

// The scheduler takes its address space at once, for the most that a graph of so many nodes could be cut into, and does
// not look at whether it got it.
bool llama_context::loop_has_room() const {
    void * p = malloc((size_t) graph_max_nodes(std::min(cparams.n_ctx, cparams.n_ubatch))*64*sizeof(ggml_tensor));
    free(p);

    return p != nullptr;
}

int32_t llama_context::loop_check(const llama_loop_plan & plan) const {
    if (cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_ARCH, "a context of a draft head (MTP) has no layers to loop.",
                "set the loop on the context of the model itself.");
    }
    if (memory && !memory->loop_supports(plan.n_slot)) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_MEMORY,
                format("this context has a kind of memory that cannot keep %d K/V slots per layer.", plan.n_slot),
                plan.n_slot > 1 ? "use another kv than each." : "run it without a loop.");
    }

    return LLAMA_LOOP_OK;
}

int32_t llama_context::loop_set(llama_loop_plan_ptr plan, int32_t decode_first) {
    const int32_t checked = plan ? loop_check(*plan) : LLAMA_LOOP_OK;
    if (checked != LLAMA_LOOP_OK) {
        return checked;
    }

    synchronize();

    if (plan && plan->halt > 0.0) {
        auto watched = std::make_shared<llama_loop_plan>(*plan);
        watched->watch = loop_watch;
        plan = watched;
    }

    const auto before         = loop_plan;
    const auto before_off     = loop_plan_off;
    const bool before_enabled = loop_enabled;

    const auto put_back = [&]() {
        loop_plan     = before;
        loop_plan_off = before_off;
        loop_enabled  = before_enabled;
        loop_apply();
    };

    // plans that differ in what they compute alone share their K/V slots, and what is in them
    const auto slots_of = [](const llama_loop_plan_ptr & p) {
        return p && p->n_slot > 1 ? std::make_tuple(p->first, p->last, (int32_t) p->n_slot) : std::make_tuple(0, 0, 1);
    };
    const bool same_slots = slots_of(plan) == slots_of(before);
    const bool is_known   = same_slots && (!plan || std::any_of(loop_reserved.begin(), loop_reserved.end(),
                [&](const auto & known) { return plan->fits(*known); }));

    loop_plan    = plan;
    loop_enabled = true;
    loop_plan_off.reset();
    loop_apply();

    if (!is_known) {
        // A plan may need more nodes and buffers than there is room for, and graphs kept for reuse may point at slots that go.
        // Reserving builds the graphs, which is where an architecture that passes the window by is found out; the memory is
        // touched only after that.
        if (!loop_has_room()) {
            loop_reserved.clear(); // what it would be nice to keep
            if (!loop_has_room()) {
                put_back();
                return llama_loop_refuse(LLAMA_LOOP_ERR_ALLOC, "out of memory: the graph of the loop does not fit.",
                        "use fewer passes, or a narrower window.");
            }
        }

        const auto before_n_outputs         = n_outputs;
        const auto before_pipeline_parallel = cparams.pipeline_parallel;

        const auto try_reserve = [&](std::string & why) {
            sched_need_reserve = true;
            try {
                sched_reserve();
                return LLAMA_LOOP_OK;
            } catch (const std::exception & e) {
                n_outputs = before_n_outputs; // left as it was in the middle of reserving
                why = e.what();
                return dynamic_cast<const llama_loop_unreached *>(&e) ? LLAMA_LOOP_ERR_ARCH : LLAMA_LOOP_ERR_ALLOC;
            }
        };

        std::string why;
        const auto res = try_reserve(why);
        if (res != LLAMA_LOOP_OK) {
            put_back();
            cparams.pipeline_parallel = before_pipeline_parallel;

            std::string again;
            sched_need_reserve = try_reserve(again) != LLAMA_LOOP_OK; // then the next decode tries

            return res == LLAMA_LOOP_ERR_ARCH ?
                llama_loop_refuse(res, why + ".", "use another window, or run it without a loop.") :
                llama_loop_refuse(res, "out of memory: " + why + ".", "use fewer passes, or a smaller ubatch.");
        }

        if (plan) {
            loop_reserved.push_back(plan);
        }
    }

    if (memory && !same_slots) {
        const auto reserve = [&](const llama_loop_plan_ptr & p) {
            return p ? memory->loop_reserve(p->first, p->last, p->n_slot) : memory->loop_reserve(0, 0, 0);
        };

        memory->clear(true);

        if (reserve(plan) != LLAMA_LOOP_OK) {
            put_back();
            sched_need_reserve = true; // there is room for the graph of the plan that was refused

            const bool kept = reserve(before) == LLAMA_LOOP_OK;
            if (!kept) {
                loop_plan = nullptr;
                loop_apply();
                reserve(nullptr);
            }
            return llama_loop_refuse(kept ? LLAMA_LOOP_ERR_ALLOC : LLAMA_LOOP_ERR_LOST,
                    "out of memory: the K/V slots of the loop do not fit.",
                    "use fewer passes, a smaller context, or another kv than each.");
        }
    }

    loop_watch->n_skipped = 0;

    loop_decode_first = decode_first;
    loop_decoded      = 0;

    return LLAMA_LOOP_OK;
}

// A single token that has others before it was generated; anything else is a prompt, which always loops.
void llama_context::loop_step(const llama_batch_ext & batch_inp) {
    if (!loop_plan || loop_decode_first < 0) {
        return;
    }

    const bool generated = batch_inp.tokens.size() == 1 && batch_inp.tokens[0].pos[0] > 0;

    loop_decoded = generated ? loop_decoded + 1 : 0;
    loop_enable(loop_decoded <= loop_decode_first);
}

int32_t llama_context::loop_enable(bool enable) {
    if (loop_plan && !enable && loop_plan->recurrent && loop_plan->kv == LLAMA_LOOP_KV_EACH) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_RECURRENT,
                format("window %d:%d has recurrent layers, and with kv each a state per pass: "
                       "a token with one pass would leave the other states behind.", loop_plan->first, loop_plan->last),
                "keep the loop on, or use kv first.");
    }

    if (loop_plan && enable != loop_enabled) {
        loop_enabled = enable;
        loop_apply();
    }

    return LLAMA_LOOP_OK;
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

int32_t llama_context::loop_give(llama_loop_given_ptr given) {
    if (given && !given->left.empty()) {
        if (!llama_loop_passes_state_alone(model)) {
            return llama_loop_refuse(LLAMA_LOOP_ERR_ARCH, "layers of this model may read what earlier ones keep beside the state.",
                    "evaluate the whole graph.");
        }

        const bool routes = loop_plan && loop_plan->routing == LLAMA_LOOP_ROUTING_FROZEN && model.hparams.n_expert > 0;
        if (!loop_plan || !loop_enabled || loop_plan->n_eval < 2 || loop_plan->kv != LLAMA_LOOP_KV_FIRST || routes) {
            return llama_loop_refuse(LLAMA_LOOP_ERR_PLAN, "only a loop with kv first and free routing can begin in its window.",
                    "evaluate the whole graph.");
        }
    }

    loop_given = std::move(given);
    loop_apply();

    return LLAMA_LOOP_OK;
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

int32_t llama_loop_set(llama_context * ctx, const llama_loop_params * params) {
    if (!params) {
        return ctx->loop_set(nullptr);
    }

    auto plan = std::make_shared<llama_loop_plan>();

    const int32_t res = llama_loop_plan_init(ctx->get_model(), *params, *plan);
    if (res != LLAMA_LOOP_OK) {
        return res;
    }

    return ctx->loop_set(std::move(plan));
}

int32_t llama_loop_check(const llama_context * ctx, const llama_loop_params * params) {
    llama_loop_plan plan;

    const int32_t res = llama_loop_plan_init(ctx->get_model(), *params, plan);

    return res == LLAMA_LOOP_OK ? ctx->loop_check(plan) : res;
}

int32_t llama_loop_set_text(llama_context * ctx, const char * text) {
    if (!text || !*text) {
        return ctx->loop_set(nullptr);
    }

    auto spec = std::make_unique<llama_loop_spec>();

    int32_t res = llama_loop_parse(text, ctx->get_model().hparams.n_layer(), spec.get());
    if (res != LLAMA_LOOP_OK) {
        return res;
    }
    if (spec->decode_entropy >= 0.0) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_TEXT, "decode entropy evaluates a token twice, which this program does not.",
                "use another decode, or `ggufloop run`.");
    }

    auto plan = std::make_shared<llama_loop_plan>();

    res = llama_loop_plan_init(ctx->get_model(), llama_loop_spec_params(spec.get()), *plan);
    if (res != LLAMA_LOOP_OK) {
        return res;
    }
    if (plan->recurrent && plan->kv == LLAMA_LOOP_KV_EACH && spec->decode_first >= 0) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_RECURRENT,
                format("window %d:%d has recurrent layers, and with kv each a state per pass: "
                       "a token with one pass would leave the other states behind.", plan->first, plan->last),
                "use decode full, or kv first.");
    }

    const bool is_loop = plan->n_eval > 1; // one evaluation is the model as it is

    return ctx->loop_set(is_loop ? std::move(plan) : nullptr, spec->decode_first);
}

// LLAMA_LOOP makes any program loop that was linked to this library. What it asks for is done or the context is not made.
llama_context * llama_loop_from_environment(llama_context * ctx) {
    const char * text = getenv("LLAMA_LOOP");

    if (text && *text && llama_loop_set_text(ctx, text) != LLAMA_LOOP_OK) {
        fprintf(stderr, "error: LLAMA_LOOP: %s\n", llama_loop_error()); // many programs mute the library's log
        delete ctx;
        return nullptr;
    }

    return ctx;
}

int32_t llama_loop_enable(llama_context * ctx, bool enable) {
    return ctx->loop_enable(enable);
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
    ctx->loop_give(state ? std::make_shared<llama_loop_given>(llama_loop_given { { state, state + n }, {} }) : nullptr);
}

int32_t llama_loop_resume(llama_context * ctx, const float * entered, const float * left, size_t n) {
    if (!entered || !left) {
        return ctx->loop_give(nullptr);
    }

    return ctx->loop_give(std::make_shared<llama_loop_given>(llama_loop_given { { entered, entered + n }, { left, left + n } }));
}
