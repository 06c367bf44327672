#include "llama-loop-impl.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>

//
// what was refused
//

static std::string & loop_error_text() {
    static thread_local std::string text;

    return text;
}

int32_t llama_loop_refuse(int32_t status, const std::string & what, const std::string & remedy) {
    loop_error_text() = what + "\n" + remedy;
    LLAMA_LOG_ERROR("llama_loop: %s\n            %s\n", what.c_str(), remedy.c_str());

    return status;
}

const char * llama_loop_error(void) {
    return loop_error_text().c_str();
}

//
// architectures and their windows
//

namespace {

// {0} and so on become numbers
std::string filled(std::string text, const std::array<int, 3> & numbers) {
    for (size_t i = 0; i < numbers.size(); ++i) {
        const std::string mark = "{" + std::to_string(i) + "}";
        for (size_t at; (at = text.find(mark)) != std::string::npos; ) {
            text.replace(at, mark.size(), std::to_string(numbers[i]));
        }
    }

    return text;
}

bool is_among(const char * names, const char * name) {
    std::istringstream stream(names);
    for (std::string word; stream >> word; ) {
        if (word == name) {
            return true;
        }
    }

    return false;
}

// Each rule returns whether the window breaks it, and then the numbers of its sentence. models/architectures.py of
// ggufloop has the same rules under the same names, from what the file says.
struct window_t {
    const llama_hparams & hparams;

    int first;
    int last;
    int n_layer;

    std::array<int, 3> at = {};

    bool found(int a, int b = 0, int c = 0) {
        at = { a, b, c };
        return true;
    }

    bool shared_kv() {
        const int start = hparams.n_layer_kv_from_start;

        return start >= 0 && start < n_layer && last > start - 2 && first < start && found(start, start - 2, start - 1);
    }

    bool shared_kv_from_20() {
        return shared_kv();
    }

    bool ends_with_ffn() {
        for (int il = first - 1; il < last; ++il) {
            if (hparams.n_ff(il) == 0) {
                return found(il);
            }
        }
        return false;
    }

    bool after_deepstack() {
        const int n = hparams.n_deepstack_layers;

        return n > 0 && first < n + 1 && found(n, n + 1);
    }

    bool outside_deepstack() {
        for (int il = first; il < last; ++il) {
            if (hparams.deepstack_mapping_arr[il] >= 0) {
                return found(il);
            }
        }
        return false;
    }

    bool starts_with_indexer() {
        for (int il = first; il < last; ++il) {
            if (hparams.is_indexer_full(il)) {
                return il > first && found(first, il);
            }
        }
        return false;
    }

    bool without_kda() {
        for (int il = first; il < last; ++il) {
            if (hparams.n_head_kv(il) == 0) {
                return found(il);
            }
        }
        return false;
    }

    bool between_banks() {
        const int size = hparams.attn_res_block_size;
        for (int il = first; il < last; ++il) {
            if (size > 0 && il % size == 0) {
                return found(il, size);
            }
        }
        return false;
    }

    bool without_rescale() {
        const int n = hparams.rescale_every_n_layers;
        for (int il = first; il < last; ++il) {
            if (n > 0 && (il + 1) % n == 0) {
                return found(il, il + 1);
            }
        }
        return false;
    }
};

struct rule_t {
    const char * names;
    bool (window_t::*breaks)();
    const char * broken;
    const char * remedy;
};

const char * LOOPS =
#define LOOP_ARCHS(names) names
#define LOOP_REFUSED(names, reason)
#define LOOP_INDEXED(names)
#define LOOP_RULE(names, rule, broken, remedy)
#include "llama-loop-archs.h"
#undef LOOP_ARCHS
#undef LOOP_REFUSED
;

const std::pair<const char *, const char *> REFUSED[] = {
#define LOOP_ARCHS(names)
#define LOOP_REFUSED(names, reason) { names, reason },
#include "llama-loop-archs.h"
#undef LOOP_REFUSED
#undef LOOP_INDEXED
};

const char * INDEXED =
#define LOOP_REFUSED(names, reason)
#define LOOP_INDEXED(names) names
#include "llama-loop-archs.h"
#undef LOOP_INDEXED
#undef LOOP_RULE
;

const rule_t RULES[] = {
#define LOOP_INDEXED(names)
#define LOOP_RULE(names, rule, broken, remedy) { names, &window_t::rule, broken, remedy },
#include "llama-loop-archs.h"
};

int32_t check_arch(const char * arch) {
    if (is_among(LOOPS, arch)) {
        return LLAMA_LOOP_OK;
    }

    const char * reason = "the pinned llama.cpp does not know it";
    for (const auto & [names, why] : REFUSED) {
        if (is_among(names, arch)) {
            reason = why;
        }
    }

    return llama_loop_refuse(LLAMA_LOOP_ERR_ARCH, format("architecture %s cannot loop: %s.", arch, reason),
            "run it without --window. docs/architectures.md lists all that can.");
}

int32_t check_window(const char * arch, const llama_hparams & hparams, const llama_loop_params & params, int n_layer) {
    const std::string window = format("%d:%d", params.first, params.last);

    if (n_layer < 3) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_WINDOW, format("a model of %d layers has no window to loop.", n_layer),
                "it needs at least 3 layers.");
    }

    const std::string most = format("use 1:%d at most.", n_layer - 1);

    if (params.first < 1 || params.first >= params.last || params.last > n_layer) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_WINDOW,
                format("window %s is out of range: this model has %d layers.", window.c_str(), n_layer), most);
    }
    if (params.last == n_layer) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_WINDOW,
                format("window %s touches layer %d, the last one, which cannot be looped.", window.c_str(), n_layer - 1), most);
    }

    window_t w = { hparams, params.first, params.last, n_layer };
    for (const auto & rule : RULES) {
        if (is_among(rule.names, arch) && (w.*rule.breaks)()) {
            return llama_loop_refuse(LLAMA_LOOP_ERR_WINDOW,
                    format("window %s of %s cannot loop: %s.", window.c_str(), arch, filled(rule.broken, w.at).c_str()),
                    filled(rule.remedy, w.at));
        }
    }

    return LLAMA_LOOP_OK;
}

const char * kv_name(int32_t kv) {
    static const char * names[] = { "first", "last", "each", "frozen" };

    return names[kv];
}

// whether every stage is the one before it plus a multiple of that one's residual
bool is_chain(const llama_loop_plan & plan) {
    for (size_t i = 1; i < plan.rows.size(); ++i) {
        for (size_t j = 0; j + 1 < i; ++j) {
            if (plan.rows[i][j] != plan.rows[i - 1][j]) {
                return false;
            }
        }
    }

    return true;
}

int32_t malformed(const char * what) {
    return llama_loop_refuse(LLAMA_LOOP_ERR_PLAN, format("the plan is malformed: %s.", what),
            "llama-loop.h says what its fields mean.");
}

} // namespace

bool llama_loop_passes_state_alone(const llama_model & model) {
    const char * arch = llm_arch_name(model.arch);

    bool res = is_among(LOOPS, arch) && !is_among(INDEXED, arch);
    for (const auto & rule : RULES) {
        res = res && !is_among(rule.names, arch);
    }
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        res = res && !model.hparams.is_recr(il);
    }

    return res;
}

int32_t llama_loop_plan_init(const llama_model & model, const llama_loop_params & params, llama_loop_plan & plan) {
    const auto & hparams = model.hparams;

    const char *  arch    = llm_arch_name(model.arch);
    const int32_t n_layer = hparams.n_layer();
    const int32_t n_eval  = params.n_eval;

    int32_t res = check_arch(arch);
    if (res == LLAMA_LOOP_OK) {
        res = check_window(arch, hparams, params, n_layer);
    }
    if (res != LLAMA_LOOP_OK) {
        return res;
    }

    if (n_eval < 1 || n_eval > LLAMA_LOOP_MAX_EVALS || !params.A || !params.B) {
        return malformed("a tableau of 1 to 64 evaluations");
    }
    if (params.mode    < LLAMA_LOOP_MODE_BLOCK   || params.mode    > LLAMA_LOOP_MODE_LAYER ||
        params.kv      < LLAMA_LOOP_KV_FIRST     || params.kv      > LLAMA_LOOP_KV_FROZEN  ||
        params.routing < LLAMA_LOOP_ROUTING_FREE || params.routing > LLAMA_LOOP_ROUTING_FROZEN) {
        return malformed("mode, kv or routing is none of theirs");
    }
    if (params.attention < 0 || params.sinks < 0 || !(params.halt >= 0.0) || !std::isfinite(params.halt)) {
        return malformed("attention, sinks and halt are 0 or more");
    }
    if (params.attention > 0 && is_among(INDEXED, arch)) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_PLAN,
                format("attention %d cannot run on %s: an indexer chooses the keys its layers attend to.", params.attention, arch),
                "leave out attention and sinks.");
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
                return malformed("A is strictly lower triangular and finite");
            }
        }
        if (!std::isfinite(params.B[i])) {
            return malformed("B is finite");
        }
        plan.rows.emplace_back(row, row + i);
    }
    plan.rows.emplace_back(params.B, params.B + n_eval);

    if (plan.halt > 0.0 && (plan.kv == LLAMA_LOOP_KV_EACH || !is_chain(plan))) {
        return malformed("halt needs a tableau whose stages follow one another, and not kv each");
    }

    for (int32_t il = plan.first; il < plan.last; ++il) {
        plan.recurrent = plan.recurrent || hparams.is_recr(il);
    }
    if (plan.recurrent && plan.kv != LLAMA_LOOP_KV_FIRST && plan.kv != LLAMA_LOOP_KV_EACH) {
        return llama_loop_refuse(LLAMA_LOOP_ERR_RECURRENT,
                format("window %d:%d has recurrent layers, which store one state of all positions: kv %s would need one of each.",
                    plan.first, plan.last, kv_name(plan.kv)),
                "use kv first or each.");
    }

    return LLAMA_LOOP_OK;
}
