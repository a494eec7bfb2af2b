// The CUDA driver's functions: a call is done when it returns. What they do to memory is memory.cpp's, what they do
// while a stream captures graphs.cpp's.
#include "sim.h"
#include "driver.h"
#include <atomic>
#include <set>
#include <time.h>

uint64_t number(const char *name, uint64_t otherwise) { return getenv(name) ? strtoull(getenv(name), nullptr, 0) : otherwise; }
bool sim_flag(const char *name) { const char *v = getenv(name); return v && *v && strcmp(v, "0"); }
const int devices = number("SIM_DEVICES", 1);
const uint64_t card = number("SIM_MEMORY", 24ull << 30);
const bool skipping = sim_flag("SIM_SKIP");
std::mutex lock;
thread_local int current = -1;

namespace {
const bool tracing = sim_flag("SIM_TRACE"), detailed = number("SIM_STATS", 0) >= 2;

auto &streams = *new std::set<Handle>; // made and not destroyed
std::mutex streams_lock;               // of `streams` alone, which is asked for with and without the other
auto &events = *new std::set<Handle>;
auto &pinned = *new std::map<uintptr_t, size_t>; // host memory that copies do not wait for
auto &counts = *new std::map<std::string, std::pair<uint64_t, uint64_t>>; // calls, units
struct Shape { // of a call: SIM_STATS=2 counts them apart
    std::string name;
    uint64_t units, bytes;
    bool operator<(const Shape &o) const { return std::tie(name, units, bytes) < std::tie(o.name, o.units, o.bytes); }
};
auto &shapes = *new std::map<Shape, uint64_t>;
double seconds[3];

double clock_seconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

struct Error { int number; const char *name, *text; };
const Error &error_of(int number) {
    static const Error errors[] = {
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
        {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
        {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
        {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
        {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
        {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
        {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
        {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
        {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
        {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
        {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
        {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
        {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
        {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
        {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
        {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
        {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
        {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
        {0, "CUDA_ERROR_UNKNOWN", "unknown error"},
    };
    const Error *e = errors;
    while (e->number && e->number != number) e++;
    return *e;
}

struct Module { std::map<std::string, int> entries; }; // kernel name, number of parameters

// The newest PTX that a driver reads, by the driver's version: CUDA 11.0 came with PTX 7.0, 12.0 with 8.0, 13.0 with 9.0, and
// a minor version brought one each, but for 12.6, which kept 8.5, and 12.8, which has 8.7.
double newest_ptx() {
    int driver = number("SIM_DRIVER", 13000), major = driver / 1000, minor = driver % 1000 / 10;
    if (major == 12 && minor >= 6) minor--;
    return (major - 4) + minor / 10.0;
}

__attribute__((destructor)) void tell() {
    if (!sim_flag("SIM_STATS")) return;
    uint64_t launches = 0;
    for (auto &[name, c] : counts) {
        fprintf(stderr, "sim %-40s %10llu %16llu\n", name.c_str(), (unsigned long long)c.first, (unsigned long long)c.second);
        if (name.rfind("kernel ", 0) == 0) launches += c.first;
    }
    fprintf(stderr, "sim %-40s %10llu\n", "kernels", (unsigned long long)launches);
    for (int d = 0; d < devices; d++)
        fprintf(stderr, "sim peak bytes of device %d %16llu, not freed %llu\n", d, (unsigned long long)peak_bytes(d), (unsigned long long)used_bytes(d));
    fprintf(stderr, "sim CPU seconds: kernels %.2f, cuBLAS %.2f, cuDNN %.2f\n", seconds[0], seconds[1], seconds[2]);
    for (auto &[shape, calls] : shapes)
        fprintf(stderr, "sim call %s: %llu times, %llu units, %llu bytes\n", shape.name.c_str(), (unsigned long long)calls, (unsigned long long)shape.units, (unsigned long long)shape.bytes);
}
}

int thread_number() {
    static std::atomic<int> threads{0};
    static thread_local int mine = threads++;
    return mine;
}

Stream stream_of(Handle handle) {
    uintptr_t h = (uintptr_t)handle;
    std::lock_guard<std::mutex> guard(streams_lock);
    if (h > PER_THREAD_STREAM && !streams.count(handle)) sim_fail("a call on stream %#lx, which is not, or no more, there", (long)h);
    return {current, h == PER_THREAD_STREAM ? THREADS + thread_number() : h};
}

void note(const char *name, uint64_t units) {
    auto &c = counts[name];
    c.first++;
    c.second += units;
    if (tracing) fprintf(stderr, "cudasim[%d] %s %llu\n", thread_number(), name, (unsigned long long)units);
}
void note_moved(const std::string &name, uint64_t units, uint64_t bytes) {
    if (detailed) shapes[{name, units, bytes}]++;
}

SimTimer::SimTimer(int kind) : kind(kind), start(clock_seconds(CLOCK_THREAD_CPUTIME_ID)) {}
SimTimer::~SimTimer() {
    double taken = clock_seconds(CLOCK_THREAD_CPUTIME_ID) - start;
    std::lock_guard<std::mutex> guard(lock);
    seconds[kind] += taken;
}
void sim_count(const char *name, uint64_t units) { std::lock_guard<std::mutex> guard(lock); note(name, units); }
int sim_fault(const char *function) {
    const char *fault = getenv("SIM_FAULT");
    static std::atomic<int> calls{0};
    char name[64];
    int status, nth;
    if (!fault || sscanf(fault, "%63[^:]:%d:%d", name, &status, &nth) != 3 || strcmp(name, function)) return 0;
    return ++calls == nth ? status : 0;
}

// ---- what the libraries use
static thread_local Stream library_stream{-1, 0}; // none: the thread's own
static thread_local uint64_t library_bytes;        // of the call in work
SimOnStream::SimOnStream(void *stream) : before(library_stream) { library_stream = stream_of(stream); }
SimOnStream::~SimOnStream() { library_stream = before; }
static Stream library() { return library_stream.first < 0 ? stream_of((Handle)PER_THREAD_STREAM) : library_stream; }
void sim_touch(const char *who, int argument, const void *p, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    touch(who, argument, (uintptr_t)p, bytes, library());
    library_bytes += bytes;
}
int sim_enqueue(const char *name, uint64_t units, std::function<void()> work) {
    std::string called = name;
    return submit(library(), called, units, name, [called, units, work](Stream stream) {
        Stream before = std::exchange(library_stream, stream);
        library_bytes = 0;
        work();
        library_stream = before;
        std::lock_guard<std::mutex> guard(lock);
        note_moved(called, units, library_bytes);
        return OK;
    });
}

// A kernel's launch with its parameters copied, so that a graph can do it again.
struct Launch {
    const SimKernel *kernel;
    unsigned grid[3], block[3], shared;
    std::vector<std::vector<char>> values;
    int run(Stream stream) {
        std::vector<void *> parameters;
        for (auto &value : values) parameters.push_back(value.data());
        std::map<uintptr_t, uint64_t> moved; // by the end of an allocation: pointers into one piece of memory count once
        {
            std::lock_guard<std::mutex> guard(lock);
            for (int i = 0; i < kernel->count; i++)
                if (kernel->pointers >> i & 1)
                    if (uintptr_t p = *(uintptr_t *)parameters[i]) {
                        uint64_t rest = touch(kernel->name, i, p, 0, stream);
                        moved[p + rest] = std::max(moved[p + rest], rest);
                    }
            uint64_t bytes = 0;
            for (auto &[end, rest] : moved) bytes += rest;
            note_moved(std::string("kernel ") + kernel->name, threads(), bytes);
        }
        if (skipping) return OK;
        SimTimer timer(SIM_KERNELS);
        sim_launch(*kernel, grid, block, shared, parameters.data());
        for (int i = 0; i < kernel->count; i++)
            if (kernel->outputs[i]) sim_check_finite(kernel->name, kernel->outputs[i], *(void **)parameters[i]);
        return OK;
    }
    uint64_t threads() const { return (uint64_t)grid[0] * grid[1] * grid[2] * block[0] * block[1] * block[2]; }
};

constexpr int SHARED = 48 << 10, SHARED_AT_MOST = 99 << 10; // bytes a block: without asking, and asked for
static auto &shared_limits = *new std::map<const SimKernel *, int>;

extern "C" {
#pragma GCC visibility push(default)
// ---- the cards
int cuInit(unsigned) { return sim_fault("cuInit"); }
int cuDriverGetVersion(int *v) { *v = number("SIM_DRIVER", 13000); return OK; }
int cuDeviceGetCount(int *n) { *n = devices; return OK; }
int cuDeviceGet(int *device, int ordinal) { if (ordinal < 0 || ordinal >= devices) return INVALID_DEVICE; *device = ordinal; return OK; }
int cuDeviceGetName(char *name, int size, int) { snprintf(name, size, "simulated card"); return OK; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0, 16); uuid[15] = device; return OK; }
int cuDeviceGetUuid(char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = card; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break;  // threads a block, block x, y
        case 4: *value = 64; break;                    // block z
        case 5: *value = 0x7fffffff; break;            // grid x
        case 6: case 7: *value = 65535; break;         // grid y, z
        case 8: *value = SHARED; break;
        case 10: *value = 32; break;                   // warp
        case 12: case 82: *value = 64 << 10; break;    // registers a block, a multiprocessor
        case 13: *value = 1500000; break;              // clock, kHz
        case 16: *value = 64; break;                   // multiprocessors
        case 17: case 18: case 20: case 32: *value = 0; break; // run time limit, integrated, compute mode, ECC
        case 31: case 41: case 78: *value = 1; break;  // concurrent kernels, unified addresses, stream priorities
        case 33: case 50: *value = 0; break;           // PCI bus, domain
        case 34: *value = device; break;               // PCI device
        case 36: *value = 7000000; break;              // memory clock, kHz
        case 37: *value = 256; break;                  // memory bus, bits
        case 38: *value = 32 << 20; break;             // L2
        case 39: *value = 2048; break;                 // threads a multiprocessor
        case 40: *value = 2; break;                    // copy engines
        case 75: *value = number("SIM_CAPABILITY", 80) / 10; break;
        case 76: *value = number("SIM_CAPABILITY", 80) % 10; break;
        case 81: *value = 100 << 10; break;            // shared memory a multiprocessor
        case 83: case 95: *value = 1; break;           // managed memory, cooperative launch
        case 97: *value = SHARED_AT_MOST; break;
        case 106: *value = 16; break;                  // blocks a multiprocessor
        case 111: *value = 1 << 10; break;             // shared memory that the system takes of a block's
        case 115: *value = !sim_flag("SIM_NO_POOLS"); break;
        default: sim_fail("cuDeviceGetAttribute: attribute %d", attribute);
    }
    return OK;
}
int cuDevicePrimaryCtxRetain(Handle *context, int device) {
    if (int status = sim_fault("cuDevicePrimaryCtxRetain")) return status;
    *context = (Handle)(uintptr_t)(0x1000 + device);
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxGetCurrent(Handle *context) { *context = current < 0 ? nullptr : (Handle)(uintptr_t)(0x1000 + current); return OK; }
int cuCtxSetCurrent(Handle context) { current = context ? (int)((uintptr_t)context - 0x1000) : -1; return OK; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
int cuCtxSynchronize() {
    if (int status = refused_while_capturing(nullptr)) return status;
    std::lock_guard<std::mutex> guard(lock);
    note("sync of a context");
    if (int status = sim_fault("cuCtxSynchronize")) return status;
    host_awaits_device();
    return OK;
}

// ---- memory
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    std::lock_guard<std::mutex> guard(lock);
    if (current < 0) return INVALID_CONTEXT;
    if (int status = sim_fault("cuMemGetInfo")) return status;
    *free = card - used_bytes(current);
    *total = card;
    return OK;
}
static uint64_t release_threshold;
int cuDeviceGetDefaultMemPool(Handle *pool, int device) { *pool = (Handle)(uintptr_t)(0x2000 + device); return OK; }
int cuDeviceGetMemPool(Handle *pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }
int cuMemPoolSetAttribute(Handle, int attribute, void *v) { if (attribute == 4) release_threshold = *(uint64_t *)v; return OK; }
int cuMemPoolGetAttribute(Handle pool, int attribute, void *v) {
    std::lock_guard<std::mutex> guard(lock);
    int device = (int)((uintptr_t)pool - 0x2000);
    switch (attribute) {
        case 4: *(uint64_t *)v = release_threshold; break;
        case 5: case 7: *(uint64_t *)v = used_bytes(device); break;
        case 6: case 8: *(uint64_t *)v = peak_bytes(device); break;
        default: *(uint64_t *)v = 0;
    }
    return OK;
}
int cuMemPoolTrimTo(Handle, size_t) { return OK; }
int cuMemAllocAsync(Address *p, size_t bytes, Handle stream) {
    return capturing(stream_of(stream)) ? capture_allocation(p, bytes, stream_of(stream)) : allocate(p, bytes, stream_of(stream));
}
int cuMemAlloc_v2(Address *p, size_t bytes) {
    if (int status = refused_as_unsafe()) return status;
    int status = bytes ? allocate(p, bytes, stream_of(nullptr)) : INVALID_VALUE;
    if (!status) { std::lock_guard<std::mutex> guard(lock); always_ordered(*p); }
    return status;
}
int cuMemFreeAsync(Address p, Handle stream) {
    return capturing(stream_of(stream)) ? capture_release(p, stream_of(stream)) : release(p, stream_of(stream), "cuMemFreeAsync");
}
int cuMemFree_v2(Address p) {
    if (int status = refused_as_unsafe()) return status;
    { std::lock_guard<std::mutex> guard(lock); note("sync by cuMemFree"); host_awaits_device(); }
    return release(p, stream_of(nullptr), "cuMemFree");
}
int cuMemHostAlloc(void **p, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> guard(lock);
    note("pinned host memory", bytes);
    if (int status = sim_fault("cuMemHostAlloc")) return status;
    *p = malloc(bytes);
    pinned[(uintptr_t)*p] = bytes;
    return OK;
}
int cuMemFreeHost(void *p) {
    std::lock_guard<std::mutex> guard(lock);
    if (!pinned.erase((uintptr_t)p)) sim_fail("cuMemFreeHost of %p, which cuMemHostAlloc did not give", p);
    free(p);
    return OK;
}

// ---- copies
static bool is_pinned(const void *p) { // the lock is held
    auto it = pinned.upper_bound((uintptr_t)p);
    return it != pinned.begin() && (uintptr_t)p < std::prev(it)->first + std::prev(it)->second;
}
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Handle handle) {
    return submit(stream_of(handle), bytes <= 1024 ? "copy to the card, up to 1 KiB" : "copy to the card, larger", bytes, "cuMemcpyHtoD", [=](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        if (bytes) touch("cuMemcpyHtoDAsync", 0, to, bytes, stream);
        if (!skipping) memcpy((void *)to, from, bytes);
        return OK;
    });
}
int cuMemcpyHtoD_v2(Address to, const void *from, size_t bytes) {
    if (int status = refused_as_unsafe()) return status;
    return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}
int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Handle handle) {
    Stream stream = stream_of(handle);
    bool awaits;
    { std::lock_guard<std::mutex> guard(lock); awaits = !is_pinned(to); } // to pageable memory: returns when it is done
    if (awaits)
        if (int status = refused_while_capturing(&stream)) return status;
    return submit(stream, awaits ? "copy from the card (awaits it)" : "copy from the card, pinned", bytes, "cuMemcpyDtoH", [=](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        if (bytes) touch("cuMemcpyDtoHAsync", 1, from, bytes, stream);
        if (skipping) memset(to, 0, bytes);
        else memcpy(to, (void *)from, bytes);
        if (awaits) host_awaits(stream);
        return OK;
    });
}
int cuMemcpyDtoH_v2(void *to, Address from, size_t bytes) {
    if (int status = refused_as_unsafe()) return status;
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Handle handle) {
    return submit(stream_of(handle), "copy on the card", bytes, "cuMemcpyDtoD", [=](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        touch("cuMemcpyDtoDAsync", 1, from, bytes, stream);
        touch("cuMemcpyDtoDAsync", 0, to, bytes, stream);
        note_moved("copy on the card", bytes, 2 * bytes);
        if (!skipping) memmove((void *)to, (void *)from, bytes);
        return OK;
    });
}
int cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
int cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Handle handle) {
    return submit(stream_of(handle), "memset", bytes, "cuMemsetD8", [=](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        if (bytes) touch("cuMemsetD8Async", 0, to, bytes, stream);
        note_moved("memset", bytes, bytes);
        if (!skipping) memset((void *)to, value, bytes);
        return OK;
    });
}
int cuMemsetD8_v2(Address to, unsigned char value, size_t bytes) { return cuMemsetD8Async(to, value, bytes, nullptr); }

// ---- streams and events
static std::atomic<uintptr_t> handles{0x5000};
int cuStreamCreate(Handle *stream, unsigned) {
    std::lock_guard<std::mutex> guard(lock);
    note("stream created");
    if (int status = sim_fault("cuStreamCreate")) return status;
    *stream = (Handle)handles++;
    std::lock_guard<std::mutex> guard_streams(streams_lock);
    streams.insert(*stream);
    return OK;
}
int cuStreamCreateWithPriority(Handle *stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
int cuStreamDestroy_v2(Handle stream) {
    std::lock_guard<std::mutex> guard(streams_lock);
    return streams.erase(stream) ? OK : INVALID_HANDLE;
}
int cuStreamSynchronize(Handle handle) {
    Stream stream = stream_of(handle);
    if (int status = refused_while_capturing(&stream)) return status;
    std::lock_guard<std::mutex> guard(lock);
    note("sync of a stream");
    if (int status = sim_fault("cuStreamSynchronize")) return status;
    host_awaits(stream);
    return OK;
}
int cuStreamQuery(Handle handle) {
    Stream stream = stream_of(handle);
    return refused_while_capturing(&stream);
}
int cuLaunchHostFunc(Handle handle, void (*function)(void *), void *data) {
    return submit(stream_of(handle), "host function", 0, "cuLaunchHostFunc", [=](Stream) {
        function(data);
        return OK;
    });
}
int cuEventCreate(Handle *event, unsigned flags) {
    std::lock_guard<std::mutex> guard(lock);
    note("event created");
    if (int status = sim_fault("cuEventCreate")) return status;
    *event = new Event{(flags & 2) == 0}; // CU_EVENT_DISABLE_TIMING
    events.insert(*event);
    return OK;
}
int cuEventDestroy_v2(Handle event) {
    std::lock_guard<std::mutex> guard(lock);
    if (!events.erase(event)) return INVALID_HANDLE;
    delete (Event *)event;
    return OK;
}
static Event *event_of(Handle handle) {
    std::lock_guard<std::mutex> guard(lock);
    if (!events.count(handle)) sim_fail("a call on event %p, which is not, or no more, there", handle);
    return (Event *)handle;
}
int cuEventRecord(Handle handle, Handle stream_handle) {
    Event &event = *event_of(handle);
    Stream stream = stream_of(stream_handle);
    event.capture = nullptr;
    if (capturing(stream)) return capture_event(event, stream);
    std::lock_guard<std::mutex> guard(lock);
    note("event recorded");
    if (int status = sim_fault("cuEventRecord")) return status;
    event.recorded = true;
    event.clock = clock_of(stream);
    event.seconds = clock_seconds(CLOCK_MONOTONIC);
    return OK;
}
int cuStreamWaitEvent(Handle stream_handle, Handle handle, unsigned) {
    Event &event = *event_of(handle);
    Stream stream = stream_of(stream_handle);
    int status;
    if (capture_wait(stream, event, &status)) return status;
    std::lock_guard<std::mutex> guard(lock);
    note("wait for an event");
    if ((status = sim_fault("cuStreamWaitEvent"))) return status;
    wait_for(stream, event.clock); // nothing where it was never recorded, as on the card
    return OK;
}
int cuEventSynchronize(Handle handle) {
    Event &event = *event_of(handle);
    if (event.capture) return CAPTURED_EVENT;
    std::lock_guard<std::mutex> guard(lock);
    note("sync of an event");
    if (int status = sim_fault("cuEventSynchronize")) return status;
    host_awaits(event.clock);
    return OK;
}
int cuEventQuery(Handle handle) { return event_of(handle)->capture ? CAPTURED_EVENT : OK; }
int cuEventElapsedTime_v2(float *milliseconds, Handle start, Handle end) {
    Event &from = *event_of(start), &to = *event_of(end);
    if (from.capture || to.capture) return CAPTURED_EVENT;
    if (!from.timed || !to.timed || !from.recorded || !to.recorded) return INVALID_HANDLE;
    *milliseconds = (to.seconds - from.seconds) * 1e3;
    return OK;
}
int cuEventElapsedTime(float *milliseconds, Handle start, Handle end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

// ---- kernels
int cuModuleLoadData(Handle *module, const void *image) {
    sim_count("module loaded", 0);
    if (int status = refused_as_unsafe()) return status;
    if (int status = sim_fault("cuModuleLoadData")) return status;
    auto *m = new Module;
    const char *text = (const char *)image;
    if (strncmp(text, "//", 2) && !strstr(text, ".version")) sim_fail("cuModuleLoadData: no PTX text");
    double version = 0;
    if (const char *p = strstr(text, ".version")) sscanf(p, ".version %lf", &version);
    if (version > newest_ptx() + 0.01) return UNSUPPORTED_PTX_VERSION;
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
    if (int status = sim_fault("cuModuleGetFunction")) return status;
    auto &entries = ((Module *)module)->entries;
    auto found = entries.find(name);
    if (found == entries.end()) return NOT_FOUND; // as the driver: the PTX has no such kernel
    const SimKernel *kernel = sim_find(name);
    if (!kernel) sim_fail("kernel %s is in the PTX and not in the simulator", name);
    if (kernel->count != found->second) sim_fail("kernel %s has %d parameters in the PTX and %d here", name, found->second, kernel->count);
    *function = (Handle)kernel;
    return OK;
}
int cuFuncGetAttribute(int *value, int attribute, Handle function) {
    std::lock_guard<std::mutex> guard(lock);
    auto asked = shared_limits.find((const SimKernel *)function);
    switch (attribute) {
        case 0: *value = 1024; break; // threads a block
        case 4: *value = 32; break;   // registers a thread
        case 5: case 6: *value = number("SIM_CAPABILITY", 80); break; // PTX and binary version
        case 8: *value = asked == shared_limits.end() ? SHARED : asked->second; break;
        default: *value = 0;
    }
    return OK;
}
int cuFuncSetAttribute(Handle function, int attribute, int value) {
    std::lock_guard<std::mutex> guard(lock);
    if (int status = sim_fault("cuFuncSetAttribute")) return status;
    switch (attribute) {
        case 8: // dynamic shared memory a block
            if (value < 0 || value > SHARED_AT_MOST) return INVALID_VALUE;
            shared_limits[(const SimKernel *)function] = value;
            return OK;
        case 9: // how much of the cache is shared memory, a hint in percent
            return value >= -1 && value <= 100 ? OK : INVALID_VALUE;
        default: return INVALID_VALUE;
    }
}
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, Handle, int threads, size_t shared, unsigned) {
    if (threads < 1 || threads > 1024) return INVALID_VALUE;
    int by_threads = 2048 / ((threads + 31) / 32 * 32), by_memory = (100 << 10) / (int)(shared + (1 << 10));
    *blocks = shared > SHARED_AT_MOST ? 0 : std::min({16, by_threads, by_memory});
    return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Handle function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Handle stream, void **parameters, void **) {
    const SimKernel &kernel = *(const SimKernel *)function;
    Launch launch{&kernel, {gx, gy, gz}, {bx, by, bz}, shared, {}};
    uint64_t size = (uint64_t)bx * by * bz;
    if (!launch.threads() || size > 1024 || bz > 64 || gx > 0x7fffffff || gy > 65535 || gz > 65535) return INVALID_VALUE;
    {
        std::lock_guard<std::mutex> guard(lock);
        auto asked = shared_limits.find(&kernel);
        if ((int)shared > (asked == shared_limits.end() ? SHARED : std::max(SHARED, asked->second))) return INVALID_VALUE;
    }
    for (int i = 0; i < kernel.count; i++) launch.values.emplace_back((char *)parameters[i], (char *)parameters[i] + kernel.sizes[i]);
    return submit(stream_of(stream), std::string("kernel ") + kernel.name, launch.threads(), "cuLaunchKernel", [launch](Stream stream) mutable { return launch.run(stream); });
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
