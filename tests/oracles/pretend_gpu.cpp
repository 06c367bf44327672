// A GPU that is none: what a backend sees of a GPU besides its kernels, on any machine.
//
//     g++ -shared -fPIC pretend_gpu.cpp -lggml -lggml-base -lggml-cpu     (tests/oracles/pretend.py does it)
//     pretend_gpu_register();      after the library is loaded, before a model is
//
// Its memory is not the host's to the scheduler: whatever it computes with has to be copied there, and a graph that
// reads anything else ends the process. Memory nobody wrote is NaN, when it is new and when a compute buffer is laid
// out for another graph. It takes over what has at least 32 rows, as CUDA does. It computes with the CPU's kernels, on
// one thread, so that its results are the CPU's to the bit.

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <cstdlib>
#include <cstring>
#include <set>

static const int NAN_BYTE = 0xFF, MIN_ROWS = 32;

static ggml_backend_dev_t pretend_dev(void);
static ggml_backend_buffer_type_t pretend_buft(void);

static std::set<ggml_backend_buffer_t> buffers;
static int64_t n_graphs = 0;

// memory

static void buffer_free(ggml_backend_buffer_t buf) {
    buffers.erase(buf);
    free(buf->context);
}

static void * buffer_base(ggml_backend_buffer_t buf) { return buf->context; }

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}

static bool is_ours(const ggml_tensor * t) {
    ggml_backend_buffer_t buf = t->view_src ? t->view_src->buffer : t->buffer;
    return buf && buf->buft == pretend_buft();
}

static bool buffer_cpy(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    ggml_backend_buffer_t from = src->view_src ? src->view_src->buffer : src->buffer;
    if (!is_ours(src) && !ggml_backend_buffer_is_host(from)) {
        return false;
    }
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buf, uint8_t value) { memset(buf->context, value, buf->size); }

// the allocator calls it before it lays out another graph in the buffer
static void buffer_reset(ggml_backend_buffer_t buf) { buffer_clear(buf, NAN_BYTE); }

static const char * buft_name(ggml_backend_buffer_type_t) { return "Pretend0"; }

static ggml_backend_buffer_t buffer_new(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.cpy_tensor    = buffer_cpy;
    iface.clear         = buffer_clear;
    iface.reset         = buffer_reset;
    void * data = aligned_alloc(64, (size + 64) / 64 * 64);
    if (data == nullptr) {
        return nullptr;
    }
    memset(data, NAN_BYTE, size);
    ggml_backend_buffer_t buf = ggml_backend_buffer_init(buft, iface, data, size);
    buffers.insert(buf);
    return buf;
}

static size_t alignment(ggml_backend_buffer_type_t) { return 64; }

static ggml_backend_buffer_type_t pretend_buft(void) {
    static ggml_backend_buffer_type buft = {
        { buft_name, buffer_new, alignment, nullptr, nullptr, nullptr }, pretend_dev(), nullptr,
    };
    return &buft;
}

// computing

static void set_async(ggml_backend_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    buffer_set(t->buffer, t, data, offset, size);
}

static void get_async(ggml_backend_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    buffer_get(t->buffer, t, data, offset, size);
}

static bool cpy_async(ggml_backend_t, ggml_backend_t, const ggml_tensor * src, ggml_tensor * dst) {
    return is_ours(src) && is_ours(dst) && buffer_cpy(dst->buffer, src, dst);
}

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    n_graphs++;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_view(node)) {
            continue; // nothing is computed, wherever it is
        }
        for (int j = -1; j < GGML_MAX_SRC; j++) {
            const ggml_tensor * t = j < 0 ? node : node->src[j];
            if (t != nullptr && ggml_nelements(t) > 0 && !is_ours(t)) {
                GGML_ABORT("%s, %s, uses %s, which is not in this memory", node->name, ggml_op_name(node->op), t->name);
            }
        }
    }
    return ggml_backend_graph_compute((ggml_backend_t) backend->context, graph);
}

static const char * backend_name(ggml_backend_t) { return "Pretend0"; }

static void backend_free(ggml_backend_t backend) {
    ggml_backend_free((ggml_backend_t) backend->context);
    delete backend;
}

static void synchronize(ggml_backend_t) {}

static ggml_backend_t backend_new(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 'p', 'r', 'e', 't', 'e', 'n', 'd' };
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);
    ggml_backend_i iface = {};
    iface.get_name         = backend_name;
    iface.free             = backend_free;
    iface.set_tensor_async = set_async;
    iface.get_tensor_async = get_async;
    iface.cpy_tensor_async = cpy_async;
    iface.synchronize      = synchronize;
    iface.graph_compute    = compute;
    return new ggml_backend { &guid, iface, dev, cpu };
}

// the device

static const char * dev_name(ggml_backend_dev_t) { return "Pretend0"; }
static const char * dev_description(ggml_backend_dev_t) { return "a pretend GPU"; }
static void dev_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 8 << 30; }
static enum ggml_backend_dev_type dev_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
static ggml_backend_buffer_type_t dev_buft(ggml_backend_dev_t) { return pretend_buft(); }
static bool dev_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft == pretend_buft(); }

static void dev_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name        = dev_name(dev);
    props->description = dev_description(dev);
    props->type        = dev_type(dev);
    dev_memory(dev, &props->memory_free, &props->memory_total);
    props->caps        = {};
    props->caps.async  = true;
    props->caps.mmap_support = true;
}

static bool dev_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0), op);
}

static bool dev_offload_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS:   return false;
        case GGML_OP_MUL_MAT:    return op->ne[1] >= MIN_ROWS;
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:       return op->ne[2] >= MIN_ROWS;
        default:                 return ggml_nrows(op) >= MIN_ROWS;
    }
}

static const char * reg_name(ggml_backend_reg_t) { return "Pretend"; }
static size_t reg_count(ggml_backend_reg_t) { return 1; }
static ggml_backend_dev_t reg_dev(ggml_backend_reg_t, size_t) { return pretend_dev(); }

static ggml_backend_reg registry = { GGML_BACKEND_API_VERSION, { reg_name, reg_count, reg_dev, nullptr }, nullptr };

static ggml_backend_dev_t pretend_dev(void) {
    static ggml_backend_device dev = { {}, &registry, nullptr };
    if (dev.iface.get_name == nullptr) {
        dev.iface.get_name        = dev_name;
        dev.iface.get_description = dev_description;
        dev.iface.get_memory      = dev_memory;
        dev.iface.get_type        = dev_type;
        dev.iface.get_props       = dev_props;
        dev.iface.init_backend    = backend_new;
        dev.iface.get_buffer_type = dev_buft;
        dev.iface.supports_op     = dev_supports_op;
        dev.iface.supports_buft   = dev_supports_buft;
        dev.iface.offload_op      = dev_offload_op;
    }
    return &dev;
}

extern "C" {

void pretend_gpu_register(void) { ggml_backend_register(&registry); }

// graphs computed so far; one for every split of a batch that is this device's
int64_t pretend_gpu_graphs(void) { return n_graphs; }

// bytes of compute buffers that are allocated now
size_t pretend_gpu_compute_bytes(void) {
    size_t size = 0;
    for (ggml_backend_buffer_t buf : buffers) {
        size += buf->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE ? buf->size : 0;
    }
    return size;
}

}
