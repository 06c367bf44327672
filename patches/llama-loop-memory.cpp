#include "llama-loop-impl.h"

#include "llama-kv-cache-dsa-iswa.h"
#include "llama-kv-cache-dsa.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache-msa.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-memory.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <iterator>
#include <map>

// a memory that does not know loops would keep the K/V of whichever evaluation wrote last
bool llama_memory_i::loop_supports(uint32_t /*n_slot*/) const {
    return false;
}

int32_t llama_memory_i::loop_reserve(int32_t /*first*/, int32_t /*last*/, uint32_t /*n_slot*/) {
    return LLAMA_LOOP_OK;
}

//
// memories made of two
//

static int32_t loop_reserve_both(llama_memory_i & a, llama_memory_i & b, int32_t first, int32_t last, uint32_t n_slot) {
    const int32_t res = a.loop_reserve(first, last, n_slot);

    return res == LLAMA_LOOP_OK ? b.loop_reserve(first, last, n_slot) : res;
}

#define LOOP_MEMORY_OF_TWO(memory, a, b)                                                       \
    bool memory::loop_supports(uint32_t n_slot) const {                                        \
        return a->loop_supports(n_slot) && b->loop_supports(n_slot);                           \
    }                                                                                          \
    int32_t memory::loop_reserve(int32_t first, int32_t last, uint32_t n_slot) {               \
        return loop_reserve_both(*a, *b, first, last, n_slot);                                 \
    }

LOOP_MEMORY_OF_TWO(llama_kv_cache_iswa,      kv_base,  kv_swa)
LOOP_MEMORY_OF_TWO(llama_kv_cache_dsa,       kv_mla,   kv_lid)
LOOP_MEMORY_OF_TWO(llama_kv_cache_dsa_iswa,  kv_dsa,   kv_swa)
LOOP_MEMORY_OF_TWO(llama_kv_cache_msa,       kv_base,  kv_idx)
LOOP_MEMORY_OF_TWO(llama_memory_hybrid,      mem_attn, mem_recr)
LOOP_MEMORY_OF_TWO(llama_memory_hybrid_iswa, mem_attn, mem_recr)

// inherits from a memory that knows loops, but has a third cache that does not
bool llama_memory_hybrid_idx::loop_supports(uint32_t /*n_slot*/) const {
    return false;
}

// Contexts with tensors for slots, which must not outlive the call that fails to allocate them.
static int32_t loop_allocate(
        std::map<ggml_backend_buffer_type_t, ggml_context_ptr> & ctxs,
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & out,
        size_t & n_out,
        bool no_alloc = false) {
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> bufs;
    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf { no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0) :
                                                 ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (no_alloc) { // a model that is only measured, as in common_fit_params
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        }
        if (!buf) {
            return LLAMA_LOOP_ERR_ALLOC;
        }
        // masked rows are read too, and zero times garbage may be NaN
        ggml_backend_buffer_clear(buf.get(), 0);
        bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    n_out = bufs.size();
    std::move(bufs.begin(), bufs.end(), std::back_inserter(out));

    return LLAMA_LOOP_OK;
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

// a cache that borrows another context's has no place of its own for slots
bool llama_kv_cache::loop_supports(uint32_t n_slot) const {
    return n_slot <= 1 || !other;
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

    const int32_t res = loop_allocate(ctx_map, ctxs_bufs, n_loop_bufs, hparams.no_alloc);
    if (res != LLAMA_LOOP_OK) {
        return res;
    }

    for (auto & [key, layer] : added) {
        loop_layers[key] = layers.size();
        layers.push_back(std::move(layer));
    }

    return LLAMA_LOOP_OK;
}

//
// slots of recurrent state
//

bool llama_memory_recurrent::loop_supports(uint32_t /*n_slot*/) const {
    return true;
}

// The vectors of state tensors, one per layer of the model, go on with those of the window once per further slot.
int32_t llama_memory_recurrent::loop_reserve(int32_t first, int32_t last, uint32_t n_slot) {
    const size_t n_layer = hparams.n_layer();

    for (auto * tensors : { &r_l, &s_l, &p_l }) {
        tensors->resize(n_layer);
    }
    ctxs_bufs.erase(ctxs_bufs.end() - n_loop_bufs, ctxs_bufs.end());
    n_loop_bufs = 0;

    if (n_slot <= 1) {
        return LLAMA_LOOP_OK;
    }

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctx_map;

    for (auto * tensors : { &r_l, &s_l, &p_l }) {
        for (uint32_t slot = 1; slot < n_slot; ++slot) {
            for (int32_t il = first; il < last; ++il) {
                ggml_tensor * base = (*tensors)[il];
                if (!base) {
                    tensors->push_back(nullptr);
                    continue;
                }

                auto & ctx = ctx_map[ggml_backend_buffer_get_type(base->buffer)];
                if (!ctx) {
                    ggml_init_params params = {
                        /*.mem_size   =*/ 3u*(last - first)*(n_slot - 1)*ggml_tensor_overhead(),
                        /*.mem_buffer =*/ NULL,
                        /*.no_alloc   =*/ true,
                    };
                    ctx.reset(ggml_init(params));
                    if (!ctx) {
                        return LLAMA_LOOP_ERR_ALLOC;
                    }
                }

                ggml_tensor * t = ggml_dup_tensor(ctx.get(), base);
                ggml_format_name(t, "%s_p%u", base->name, slot);
                tensors->push_back(t);
            }
        }
    }

    return loop_allocate(ctx_map, ctxs_bufs, n_loop_bufs);
}
