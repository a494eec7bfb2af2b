// Device memory is host memory. What is used must be live, of the call's card, and ordered after its last use.
#include "sim.h"
#include "driver.h"
#include <atomic>
#include <set>
#include <sys/mman.h>

namespace {
const bool guarded = sim_flag("SIM_GUARD"), strict = sim_flag("SIM_STRICT");

struct Memory {
    size_t bytes;
    int device;
    Stream stream;     // that used it last
    uint64_t sequence; // when
    void *map;
    size_t mapped;
    bool graph, there; // of a graph: whether it is allocated just now
};
auto &memory = *new std::map<uintptr_t, Memory>; // lives as long as the process, as what is below
auto &used = *new std::vector<uint64_t>(64), &peak = *new std::vector<uint64_t>(64);
auto &finished = *new Clock;               // per stream: what was told up to here the host knows to be done
auto &seen = *new std::map<Stream, Clock>; // the same for what a stream waited for
uint64_t now = 1;
auto &hazards = *new std::set<std::string>;
uint64_t hazard_count;

size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }

void merge(Clock &into, const Clock &from) {
    for (auto &[stream, at] : from) into[stream] = std::max(into[stream], at);
}

bool ordered(const Memory &m, Stream stream) {
    return m.stream == stream || m.sequence <= finished[m.stream] || m.sequence <= seen[stream][m.stream];
}

std::string name_of(Stream stream) {
    if (stream.second >= THREADS) return "the stream of thread " + std::to_string(stream.second - THREADS);
    return "stream " + std::to_string(stream.second);
}

void hazard(const char *who, const Memory &m, Stream stream) {
    hazard_count++;
    std::string text = std::string(who) + " on " + name_of(stream) + ", memory last used on " + name_of(m.stream) + ", nothing awaited";
    if (hazards.insert(text).second && strict) sim_fail("%s", text.c_str());
}

std::map<uintptr_t, Memory>::iterator find(uintptr_t p) {
    auto it = memory.upper_bound(p);
    if (it == memory.begin()) return memory.end();
    --it;
    return p <= it->first + it->second.bytes ? it : memory.end();
}

uintptr_t map_memory(Memory &m) {
    char *p;
    if (guarded) { // ends at a page that must not be touched, but for less than 16 bytes of alignment
        size_t page = 4096, body = (m.bytes + page - 1) / page * page;
        m.mapped = body + page;
        m.map = mmap(nullptr, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (m.map == MAP_FAILED) sim_fail("no address space for %zu bytes", m.bytes);
        mprotect((char *)m.map + body, page, PROT_NONE);
        p = (char *)m.map + (body - m.bytes) / 16 * 16;
        if (m.bytes == 0) p = (char *)m.map + body;
    } else if (skipping) { // zeros that take no memory of this machine
        m.mapped = std::max<size_t>(rounded(m.bytes), 512);
        m.map = mmap(nullptr, m.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (m.map == MAP_FAILED) sim_fail("no address space for %zu bytes", m.bytes);
        p = (char *)m.map;
    } else
        m.map = p = (char *)aligned_alloc(512, std::max<size_t>(rounded(m.bytes), 512));
    return (uintptr_t)p;
}

void unmap(uintptr_t p, const Memory &m) {
    if (m.mapped) munmap(m.map, m.mapped);
    else {
        memset((void *)p, 0xfe, std::min<size_t>(m.bytes, 4096));
        free(m.map);
    }
}

// NaN in every float type: what is read unwritten shows.
void spoil(uintptr_t p, const Memory &m) {
    if (!skipping) memset((void *)p, 0xff, m.bytes);
}

__attribute__((destructor)) void tell() {
    if (hazard_count) {
        fprintf(stderr, "cudasim: %llu unordered uses of memory across streams:\n", (unsigned long long)hazard_count);
        for (auto &text : hazards) fprintf(stderr, "  %s\n", text.c_str());
    }
}
}

void hold(int device, int64_t bytes) {
    used[device] += bytes;
    peak[device] = std::max(peak[device], used[device]);
}
uint64_t used_bytes(int device) { return used[device]; }
uint64_t peak_bytes(int device) { return peak[device]; }

int allocate(Address *out, size_t bytes, Stream stream) {
    std::lock_guard<std::mutex> guard(lock);
    if (current < 0) return INVALID_CONTEXT;
    note(bytes ? "alloc" : "alloc of no bytes", bytes);
    if (int status = sim_fault("cuMemAlloc")) return status;
    if (used[current] + rounded(bytes) > card) return OUT_OF_MEMORY;
    Memory m{bytes, current, stream, ++now, nullptr, 0, false, true};
    uintptr_t p = map_memory(m);
    spoil(p, m);
    memory[p] = m;
    hold(current, rounded(bytes));
    *out = p;
    return OK;
}

int release(Address p, Stream stream, const char *who) {
    std::lock_guard<std::mutex> guard(lock);
    note("free");
    if (int status = sim_fault("cuMemFree")) return status;
    auto it = memory.find(p);
    if (it == memory.end() || !it->second.there) sim_fail("%s of %#lx, which is no live device memory", who, (long)p);
    Memory &m = it->second;
    if (!ordered(m, stream)) hazard(who, m, stream);
    if (m.graph) {
        m.there = false;
        return OK;
    }
    hold(m.device, -(int64_t)rounded(m.bytes));
    unmap(p, m);
    memory.erase(it);
    return OK;
}

size_t touch(const char *who, int argument, uintptr_t p, size_t bytes, Stream stream) {
    auto it = find(p);
    if (it == memory.end() || !it->second.there) sim_fail("%s: argument %d, %#lx, is no live device memory", who, argument, (long)p);
    Memory &m = it->second;
    if (p + bytes > it->first + m.bytes) sim_fail("%s: argument %d is %zu bytes, %zu too many", who, argument, bytes, p + bytes - it->first - m.bytes);
    if (m.device != stream.first) sim_fail("%s: argument %d lies on device %d, the call is on %d", who, argument, m.device, stream.first);
    if (!ordered(m, stream)) hazard(who, m, stream);
    m.stream = stream;
    m.sequence = ++now;
    return it->first + m.bytes - p;
}

bool span(uintptr_t p, size_t *bytes) {
    auto it = find(p);
    if (it == memory.end()) return false;
    *bytes = it->first + it->second.bytes - p;
    return true;
}

void always_ordered(Address p) { find(p)->second.sequence = 0; }

Clock clock_of(Stream stream) {
    Clock clock = seen[stream];
    clock[stream] = now;
    return clock;
}
void wait_for(Stream stream, const Clock &clock) { merge(seen[stream], clock); }
void host_awaits(const Clock &clock) { merge(finished, clock); }
void host_awaits(Stream stream) { host_awaits(clock_of(stream)); }
void host_awaits_device() {
    for (auto &[stream, at] : finished) if (stream.first == current) at = now;
    for (auto &[p, m] : memory) if (m.device == current) finished[m.stream] = now;
}

Address reserve(size_t bytes, Stream stream) {
    Memory m{bytes, stream.first, stream, ++now, nullptr, 0, true, false};
    uintptr_t p = map_memory(m);
    memory[p] = m;
    return p;
}
void appear(Address p, Stream stream) {
    Memory &m = memory.at(p);
    m.there = true;
    m.stream = stream;
    m.sequence = ++now;
    spoil(p, m);
}
void disappear(Address p, Stream stream, const char *who) {
    Memory &m = memory.at(p);
    if (!m.there) sim_fail("%s of %#lx, which is no live device memory", who, (long)p);
    if (!ordered(m, stream)) hazard(who, m, stream);
    m.there = false;
}
void give_back(Address p) {
    auto it = memory.find(p);
    unmap(p, it->second);
    memory.erase(it);
}
void keep(Address p) {
    Memory &m = memory.at(p);
    m.graph = false;
    hold(m.device, rounded(m.bytes));
}
bool is_there(Address p) {
    auto it = memory.find(p);
    return it != memory.end() && it->second.there;
}

void sim_check_finite(const char *who, char type, const void *pointer, size_t bytes) {
    static const bool on = sim_flag("SIM_FINITE");
    static std::atomic<int> told{0};
    if (!on || told >= 20 || !strncmp(who, "copy2d", 6)) return; // copy2d writes parts of its output
    {
        std::lock_guard<std::mutex> guard(lock);
        size_t rest;
        if (!span((uintptr_t)pointer, &rest)) return;
        if (!bytes) bytes = rest;
    }
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
