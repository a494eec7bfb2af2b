// The CUDA driver: device memory is host memory, a stream is done as soon as it is told.
#include "sim.h"
#include "device.h"
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

namespace {
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
using Handle = void *;
using Address = uint64_t;
constexpr uintptr_t PER_THREAD_STREAM = 2;

const char *setting(const char *name) { return getenv(name); }
uint64_t number(const char *name, uint64_t otherwise) { return setting(name) ? strtoull(setting(name), nullptr, 0) : otherwise; }
const int devices = number("SIM_DEVICES", 1);
const uint64_t card = number("SIM_MEMORY", 24ull << 30); // bytes a card has
const bool tracing = sim_flag("SIM_TRACE"), guarded = sim_flag("SIM_GUARD"), strict = sim_flag("SIM_STRICT"), skipping = sim_flag("SIM_SKIP");

std::mutex lock;
thread_local int current = -1;

// A stream is known by the handle and, where that means "this thread's own", the thread.
std::atomic<int> threads{0};
thread_local int this_thread = threads++;
using Stream = std::pair<int, uintptr_t>; // device, handle or thread
Stream stream_of(Handle handle) {
    uintptr_t h = (uintptr_t)handle;
    return {current, h == PER_THREAD_STREAM ? 1000000 + this_thread : h};
}

struct Memory {
    size_t bytes;
    int device;
    Stream stream;      // that used it last
    uint64_t sequence;  // when
    void *map;
    size_t mapped;
};
std::map<uintptr_t, Memory> memory;
std::vector<uint64_t> used(64), peak(64);
std::map<Stream, uint64_t> finished; // per stream: what was told up to here is done for sure
uint64_t now = 1;

std::map<std::string, std::pair<uint64_t, uint64_t>> counts; // calls, units
std::set<std::string> hazards;
uint64_t hazard_count;
double seconds[3];

void note(const char *name, uint64_t units = 0) {
    auto &c = counts[name];
    c.first++;
    c.second += units;
    if (tracing) fprintf(stderr, "cudasim[%d] %s %llu\n", this_thread, name, (unsigned long long)units);
}

void hazard(const char *who, const Memory &m) {
    hazard_count++;
    char text[200];
    snprintf(text, sizeof text, "%s on the stream of thread %d, memory last used on the stream of thread %d, nothing awaited",
             who, this_thread, (int)m.stream.second - 1000000);
    if (hazards.insert(text).second && strict) sim_fail("%s", text);
}

std::map<uintptr_t, Memory>::iterator find(uintptr_t p) {
    auto it = memory.upper_bound(p);
    if (it == memory.begin()) return memory.end();
    --it;
    return p <= it->first + it->second.bytes ? it : memory.end();
}

void touch(const char *who, int argument, uintptr_t p, size_t bytes, Stream stream) {
    auto it = find(p);
    if (it == memory.end()) sim_fail("%s: argument %d, %#lx, is no live device memory", who, argument, (long)p);
    Memory &m = it->second;
    if (p + bytes > it->first + m.bytes) sim_fail("%s: argument %d is %zu bytes, %zu too many", who, argument, bytes, p + bytes - it->first - m.bytes);
    if (m.device != stream.first) sim_fail("%s: argument %d lies on device %d, the call is on %d", who, argument, m.device, stream.first);
    if (m.stream != stream && m.sequence > finished[m.stream]) hazard(who, m);
    m.stream = stream;
    m.sequence = ++now;
}

int allocate(Address *out, size_t bytes, Stream stream) {
    std::lock_guard<std::mutex> hold(lock);
    if (current < 0) return INVALID_CONTEXT;
    note(bytes ? "alloc" : "alloc of no bytes", bytes);
    if (int status = sim_fault("cuMemAlloc")) return status;
    size_t rounded = (bytes + 511) / 512 * 512;
    if (used[current] + rounded > card) return OUT_OF_MEMORY;
    Memory m{bytes, current, stream, ++now, nullptr, 0};
    char *p;
    if (guarded) { // ends at a page that must not be touched, but for less than 16 bytes of alignment
        size_t page = 4096, body = (bytes + page - 1) / page * page;
        m.mapped = body + page;
        m.map = mmap(nullptr, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect((char *)m.map + body, page, PROT_NONE);
        p = (char *)m.map + (body - bytes) / 16 * 16;
        if (bytes == 0) p = (char *)m.map + body;
    } else if (skipping) { // zeros that take no memory of this machine
        m.mapped = rounded ? rounded : 512;
        m.map = mmap(nullptr, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m.map == MAP_FAILED) sim_fail("no address space for %zu bytes", bytes);
        p = (char *)m.map;
    } else
        m.map = p = (char *)aligned_alloc(512, rounded ? rounded : 512);
    if (!skipping) memset(p, 0xff, bytes); // NaN in every float type: what is read unwritten shows
    memory[(uintptr_t)p] = m;
    used[current] += rounded;
    peak[current] = std::max(peak[current], used[current]);
    *out = (Address)p;
    return OK;
}

int release(Address p, Stream stream, const char *who) {
    std::lock_guard<std::mutex> hold(lock);
    note("free");
    auto it = memory.find(p);
    if (it == memory.end()) sim_fail("%s of %#lx, which is no live device memory", who, (long)p);
    Memory &m = it->second;
    if (m.stream != stream && m.sequence > finished[m.stream]) hazard(who, m);
    used[m.device] -= (m.bytes + 511) / 512 * 512;
    if (m.mapped) munmap(m.map, m.mapped);
    else {
        memset((void *)p, 0xfe, std::min<size_t>(m.bytes, 4096));
        free(m.map);
    }
    memory.erase(it);
    return OK;
}

void finish(Stream stream) { finished[stream] = now; }
void finish_device() { for (auto &[stream, at] : finished) if (stream.first == current) at = now; for (auto &[p, m] : memory) if (m.device == current) finished[m.stream] = now; }

struct Error { int number; const char *name, *text; };
const Error &error_of(int number) {
    static const Error errors[] = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
        {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
        {0, "CUDA_ERROR_UNKNOWN", "unknown error"},
    };
    const Error *e = errors;
    while (e->number && e->number != number) e++;
    return *e;
}

struct Module { std::map<std::string, int> entries; }; // kernel name, number of parameters

double cpu() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

struct AtExit {
    ~AtExit() {
        if (hazard_count) {
            fprintf(stderr, "cudasim: %llu unordered uses of memory across streams:\n", (unsigned long long)hazard_count);
            for (auto &text : hazards) fprintf(stderr, "  %s\n", text.c_str());
        }
        if (!sim_flag("SIM_STATS")) return;
        uint64_t launches = 0;
        for (auto &[name, c] : counts) {
            fprintf(stderr, "sim %-40s %10llu %16llu\n", name.c_str(), (unsigned long long)c.first, (unsigned long long)c.second);
            if (name.rfind("kernel ", 0) == 0) launches += c.first;
        }
        fprintf(stderr, "sim %-40s %10llu\n", "kernels", (unsigned long long)launches);
        for (int d = 0; d < devices; d++) fprintf(stderr, "sim peak bytes of device %d %16llu, not freed %llu\n", d, (unsigned long long)peak[d], (unsigned long long)used[d]);
        fprintf(stderr, "sim CPU seconds: kernels %.2f, cuBLAS %.2f, cuDNN %.2f\n", seconds[0], seconds[1], seconds[2]);
    }
} at_exit;
}

SimTimer::SimTimer(int kind) : kind(kind), start(cpu()) {}
SimTimer::~SimTimer() { double d = cpu() - start; std::lock_guard<std::mutex> hold(lock); seconds[kind] += d; }
static thread_local Handle library_stream = (Handle)PER_THREAD_STREAM;
SimOnStream::SimOnStream(void *stream) : before(library_stream) { library_stream = stream; }
SimOnStream::~SimOnStream() { library_stream = before; }
void sim_touch(const char *who, int argument, const void *p, size_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    touch(who, argument, (uintptr_t)p, bytes, stream_of(library_stream));
}
int sim_enqueue(const char *name, uint64_t units, std::function<void()> work) {
    sim_count(name, units);
    if (int status = sim_fault(name)) return status;
    work();
    return OK;
}
void sim_count(const char *name, uint64_t units) { std::lock_guard<std::mutex> hold(lock); note(name, units); }
bool sim_flag(const char *name) { const char *v = getenv(name); return v && *v && strcmp(v, "0"); }
void sim_check_finite(const char *who, char type, const void *pointer, size_t bytes) {
    static const bool on = sim_flag("SIM_FINITE");
    static std::atomic<int> told{0};
    if (!on || told >= 20 || !strncmp(who, "copy2d", 6)) return; // copy2d writes parts of its output
    std::unique_lock<std::mutex> hold(lock);
    auto it = find((uintptr_t)pointer);
    if (it == memory.end()) return;
    if (!bytes) bytes = it->first + it->second.bytes - (uintptr_t)pointer;
    hold.unlock();
    size_t n = bytes / (type == 'f' ? 4 : 2), bad = 0;
    float largest = 0;
    for (size_t i = 0; i < n; i++) {
        float x = type == 'f' ? ((const float *)pointer)[i] : type == 'h' ? (float)((const __half *)pointer)[i] : (float)((const __nv_bfloat16 *)pointer)[i];
        if (std::isfinite(x)) largest = fmaxf(largest, fabsf(x));
        else bad += type != 'f' || !(x < 0); // minus infinity is what masks are made of
    }
    if (!bad) return;
    told++;
    fprintf(stderr, "cudasim: %s: %zu of %zu values are not finite, the largest other is %g (launch %llu)\n", who, bad, n, largest, (unsigned long long)now);
}
int sim_fault(const char *function) {
    const char *fault = getenv("SIM_FAULT");
    static std::atomic<int> calls{0};
    char name[64];
    int status, nth;
    if (!fault || sscanf(fault, "%63[^:]:%d:%d", name, &status, &nth) != 3 || strcmp(name, function)) return 0;
    return ++calls == nth ? status : 0;
}

extern "C" {
#pragma GCC visibility push(default)
int cuInit(unsigned) { return sim_fault("cuInit"); }
int cuDriverGetVersion(int *v) { *v = 13000; return OK; }
int cuDeviceGetCount(int *n) { *n = devices; return OK; }
int cuDeviceGet(int *device, int ordinal) { if (ordinal < 0 || ordinal >= devices) return INVALID_DEVICE; *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int size, int) { snprintf(name, size, "simulated card"); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = card; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break;  // threads a block, block x, y
        case 4: *value = 64; break;                    // block z
        case 5: *value = 0x7fffffff; break;            // grid x
        case 6: case 7: *value = 65535; break;         // grid y, z
        case 8: *value = 48 << 10; break;              // shared memory a block
        case 10: *value = 32; break;                   // warp
        case 16: *value = 64; break;                   // multiprocessors
        case 39: *value = 2048; break;                 // threads a multiprocessor
        case 75: *value = number("SIM_CAPABILITY", 80) / 10; break;
        case 76: *value = number("SIM_CAPABILITY", 80) % 10; break;
        case 97: *value = 99 << 10; break;             // shared memory a block, at most, asked for
        case 115: *value = !sim_flag("SIM_NO_POOLS"); break;
        default: sim_fail("cuDeviceGetAttribute: attribute %d", attribute);
    }
    return OK;
}
int cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = (Handle)(uintptr_t)(0x1000 + device); return OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxGetCurrent(Handle *context) { *context = current < 0 ? nullptr : (Handle)(uintptr_t)(0x1000 + current); return OK; }
int cuCtxSetCurrent(Handle context) { current = context ? (int)((uintptr_t)context - 0x1000) : -1; return OK; }
int cuCtxSynchronize() { std::lock_guard<std::mutex> hold(lock); note("sync of a context"); finish_device(); return OK; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { std::lock_guard<std::mutex> hold(lock); *free = card - used[current]; *total = card; return OK; }
int cuDeviceGetDefaultMemPool(Handle *pool, int device) { *pool = (Handle)(uintptr_t)(0x2000 + device); return OK; }
int cuMemPoolSetAttribute(Handle, int, void *) { return OK; }
int cuMemPoolGetAttribute(Handle, int, void *v) { *(uint64_t *)v = 0; return OK; }
int cuMemPoolTrimTo(Handle, size_t) { return OK; }

int cuMemAllocAsync(Address *p, size_t bytes, Handle stream) { return allocate(p, bytes, stream_of(stream)); }
int cuMemAlloc_v2(Address *p, size_t bytes) {
    int status = bytes ? allocate(p, bytes, stream_of(nullptr)) : INVALID_VALUE;
    if (!status) { std::lock_guard<std::mutex> hold(lock); find(*p)->second.sequence = 0; } // at once there for every stream
    return status;
}
int cuMemFreeAsync(Address p, Handle stream) { return release(p, stream_of(stream), "cuMemFreeAsync"); }
int cuMemFree_v2(Address p) { { std::lock_guard<std::mutex> hold(lock); note("sync by cuMemFree"); finish_device(); } return release(p, stream_of(nullptr), "cuMemFree"); }
int cuMemHostAlloc(void **p, size_t bytes, unsigned) { *p = malloc(bytes); return OK; }
int cuMemFreeHost(void *p) { free(p); return OK; }

int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Handle stream) {
    std::lock_guard<std::mutex> hold(lock);
    note(bytes <= 1024 ? "copy to the card, up to 1 KiB" : "copy to the card, larger", bytes);
    if (bytes) touch("cuMemcpyHtoDAsync", 0, to, bytes, stream_of(stream));
    if (!skipping) memcpy((void *)to, from, bytes);
    return OK;
}
int cuMemcpyHtoD_v2(Address to, const void *from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Handle stream) {
    std::lock_guard<std::mutex> hold(lock);
    note("copy from the card (awaits it)", bytes); // to pageable memory: returns when it is done
    if (bytes) touch("cuMemcpyDtoHAsync", 1, from, bytes, stream_of(stream));
    if (skipping) memset(to, 0, bytes);
    else memcpy(to, (void *)from, bytes);
    finish(stream_of(stream));
    return OK;
}
int cuMemcpyDtoH_v2(void *to, Address from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Handle stream) {
    std::lock_guard<std::mutex> hold(lock);
    note("copy on the card", bytes);
    touch("cuMemcpyDtoDAsync", 1, from, bytes, stream_of(stream));
    touch("cuMemcpyDtoDAsync", 0, to, bytes, stream_of(stream));
    if (!skipping) memmove((void *)to, (void *)from, bytes);
    return OK;
}
int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Handle stream) {
    std::lock_guard<std::mutex> hold(lock);
    note("memset", bytes);
    if (bytes) touch("cuMemsetD8Async", 0, to, bytes, stream_of(stream));
    if (!skipping) memset((void *)to, value, bytes);
    return OK;
}

static std::atomic<uintptr_t> handles{0x5000};
int cuStreamCreate(Handle *stream, unsigned) { *stream = (Handle)handles++; return OK; }
int cuStreamDestroy_v2(Handle) { return OK; }
int cuStreamSynchronize(Handle stream) { std::lock_guard<std::mutex> hold(lock); note("sync of a stream"); finish(stream_of(stream)); return OK; }
int cuStreamIsCapturing(Handle, int *status) { *status = 0; return OK; }
int cuStreamWaitEvent(Handle, Handle, unsigned) { std::lock_guard<std::mutex> hold(lock); note("wait for an event"); finish_device(); return OK; }
int cuEventCreate(Handle *event, unsigned) { std::lock_guard<std::mutex> hold(lock); note("event created"); *event = (Handle)handles++; return OK; }
int cuEventDestroy_v2(Handle) { return OK; }
int cuEventRecord(Handle, Handle) { std::lock_guard<std::mutex> hold(lock); note("event recorded"); return OK; }
int cuEventSynchronize(Handle) { std::lock_guard<std::mutex> hold(lock); note("sync of an event"); finish_device(); return OK; }
int cuEventQuery(Handle) { return OK; }

int cuModuleLoadData(Handle *module, const void *image) {
    sim_count("module loaded", 0);
    if (int status = sim_fault("cuModuleLoadData")) return status;
    auto *m = new Module;
    const char *text = (const char *)image;
    if (strncmp(text, "//", 2) && !strstr(text, ".version")) sim_fail("cuModuleLoadData: no PTX text");
    for (const char *p = text; (p = strstr(p, ".entry "));) {
        p += 7;
        size_t n = strcspn(p, "(\n ");
        std::string name(p, n);
        int parameters = 0;
        for (const char *q = p, *end = strchr(p, ')'); (q = strstr(q, ".param ")) && q < end; q += 7) parameters++;
        m->entries[name] = parameters;
    }
    *module = m;
    return OK;
}
int cuModuleUnload(Handle) { return OK; }
int cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    auto &entries = ((Module *)module)->entries;
    auto found = entries.find(name);
    if (found == entries.end()) return NOT_FOUND; // as the driver: the PTX has no such kernel
    const SimKernel *kernel = sim_find(name);
    if (!kernel) sim_fail("kernel %s is in the PTX and not in the simulator", name);
    if (kernel->count != found->second) sim_fail("kernel %s has %d parameters in the PTX and %d here", name, found->second, kernel->count);
    *function = (Handle)kernel;
    return OK;
}
int cuFuncGetAttribute(int *value, int, Handle) { *value = 1024; return OK; }
int cuFuncSetAttribute(Handle, int, int) { return OK; }
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Handle stream, void **parameters, void **) {
    const SimKernel &kernel = *(const SimKernel *)function;
    uint64_t blocks = (uint64_t)gx * gy * gz, size = (uint64_t)bx * by * bz;
    {
        std::lock_guard<std::mutex> hold(lock);
        note((std::string("kernel ") + kernel.name).c_str(), blocks * size);
        if (int status = sim_fault("cuLaunchKernel")) return status;
        if (!blocks || !size || size > 1024 || bz > 64 || gx > 0x7fffffff || gy > 65535 || gz > 65535 || shared > 99 << 10) return INVALID_VALUE;
        for (int i = 0; i < kernel.count; i++)
            if (kernel.pointers >> i & 1)
                if (uintptr_t p = *(uintptr_t *)parameters[i]) touch(kernel.name, i, p, 0, stream_of(stream));
    }
    if (skipping) return OK;
    SimTimer timer(SIM_KERNELS);
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    sim_launch(kernel, grid, block, shared, parameters);
    for (int i = 0; i < kernel.count; i++)
        if (kernel.outputs[i]) sim_check_finite(kernel.name, kernel.outputs[i], *(void **)parameters[i]);
    return OK;
}
int cuGetErrorName(int error, const char **text) {
    *text = error_of(error).name;
    return OK;
}
int cuGetErrorString(int error, const char **text) {
    *text = error_of(error).text;
    return OK;
}
#pragma GCC visibility pop
}
