// Graphs: what a stream is told while it captures is kept, and done at every launch of the graph.
#include "sim.h"
#include "driver.h"
#include <set>

namespace {
enum Mode { GLOBAL, THREAD_LOCAL, RELAXED };
thread_local int thread_mode = GLOBAL;

struct Node {
    std::string name;
    uint64_t units;
    Work work;
};

struct Allocation {
    Address address;
    size_t bytes;
};

// What a capture made: the memory is its own for as long as the graph or a program of it lives.
struct Recording {
    int device;
    std::vector<Node> nodes;
    std::vector<Allocation> allocations;
    std::set<Address> left; // not freed within the graph
    int64_t footprint = 0, most = 0;
    ~Recording() {
        for (auto &a : allocations) is_there(a.address) ? keep(a.address) : give_back(a.address);
    }
};
struct Graph { std::shared_ptr<Recording> recording; };
struct Executable {
    std::shared_ptr<Recording> recording;
    bool frees_itself; // CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
    bool holding = false; // its memory is counted
};
size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }
}

struct Capture {
    Stream origin;
    int mode, thread;
    bool broken = false;
    std::shared_ptr<Recording> recording = std::make_shared<Recording>();
    std::set<Stream> unjoined;
};

namespace {
auto &captures = *new std::map<Stream, std::shared_ptr<Capture>>; // the streams of every capture
auto &graphs = *new std::set<Handle>, &executables = *new std::set<Handle>;

std::shared_ptr<Capture> capture_of(Stream stream) {
    auto it = captures.find(stream);
    return it == captures.end() ? nullptr : it->second;
}

// Every node is told to its own stream's capture; a stream that joined has something to be waited for again.
int record(Capture &capture, Stream stream, Node node) {
    if (capture.broken) return CAPTURE_INVALIDATED;
    if (stream != capture.origin) capture.unjoined.insert(stream);
    capture.recording->nodes.push_back(std::move(node));
    return OK;
}

void end(const std::shared_ptr<Capture> &capture) {
    for (auto it = captures.begin(); it != captures.end();) it = it->second == capture ? captures.erase(it) : std::next(it);
}
}

bool capturing(Stream stream) {
    std::lock_guard<std::mutex> guard(lock);
    return captures.count(stream);
}

int submit(Stream stream, const std::string &name, uint64_t units, const char *fault, Work work) {
    {
        std::lock_guard<std::mutex> guard(lock);
        auto capture = capture_of(stream);
        if (!capture) note(name.c_str(), units);
        if (int status = sim_fault(fault)) return status;
        if (capture) return record(*capture, stream, {name, units, std::move(work)});
    }
    return work(stream);
}

int refused_while_capturing(const Stream *stream) {
    std::lock_guard<std::mutex> guard(lock);
    int status = OK;
    for (auto &[s, capture] : captures)
        if (stream ? s == *stream : s.first == current) {
            capture->broken = true;
            status = CAPTURE_UNSUPPORTED;
        }
    return status;
}

int refused_as_unsafe() {
    std::lock_guard<std::mutex> guard(lock);
    if (thread_mode == RELAXED) return OK;
    int status = OK;
    for (auto &[s, capture] : captures) {
        bool everywhere = capture->mode == GLOBAL && thread_mode == GLOBAL;
        bool here = capture->thread == thread_number() && capture->mode != RELAXED;
        if (!everywhere && !here) continue;
        capture->broken = true;
        status = CAPTURE_UNSUPPORTED;
    }
    return status;
}

int capture_allocation(Address *out, size_t bytes, Stream stream) {
    std::lock_guard<std::mutex> guard(lock);
    auto capture = capture_of(stream);
    if (int status = sim_fault("cuMemAlloc")) return status;
    if (capture->broken) return CAPTURE_INVALIDATED;
    Recording &recording = *capture->recording;
    if (used_bytes(current) + recording.footprint + rounded(bytes) > card) return OUT_OF_MEMORY;
    Address p = reserve(bytes, stream);
    recording.allocations.push_back({p, bytes});
    recording.left.insert(p);
    recording.footprint += rounded(bytes);
    recording.most = std::max(recording.most, recording.footprint);
    *out = p;
    return record(*capture, stream, {bytes ? "alloc" : "alloc of no bytes", bytes, [p](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        appear(p, stream);
        return OK;
    }});
}

int capture_release(Address p, Stream stream) {
    std::lock_guard<std::mutex> guard(lock);
    auto capture = capture_of(stream);
    if (capture->broken) return CAPTURE_INVALIDATED;
    Recording &recording = *capture->recording;
    if (!recording.left.erase(p)) { // not of this graph: the driver takes only a graph's memory here
        capture->broken = true;
        return INVALID_VALUE;
    }
    for (auto &a : recording.allocations)
        if (a.address == p) recording.footprint -= rounded(a.bytes);
    return record(*capture, stream, {"free", 0, [p](Stream stream) {
        std::lock_guard<std::mutex> guard(lock);
        disappear(p, stream, "a graph's free");
        return OK;
    }});
}

int capture_event(Event &event, Stream stream) {
    std::lock_guard<std::mutex> guard(lock);
    auto capture = capture_of(stream);
    if (!capture) return OK;
    if (capture->broken) return CAPTURE_INVALIDATED;
    event.capture = capture;
    event.stream = stream;
    return OK;
}

bool capture_wait(Stream stream, Event &event, int *status) {
    std::lock_guard<std::mutex> guard(lock);
    auto waiting = capture_of(stream);
    if (!waiting && !event.capture) return false;
    *status = OK;
    auto ended = event.capture && !captures.count(event.capture->origin);
    if (ended || (waiting && !event.capture)) { // work outside the capture would become part of it
        if (waiting) waiting->broken = true;
        *status = ended && !waiting ? CAPTURED_EVENT : CAPTURE_ISOLATION;
    } else if (waiting && waiting != event.capture) {
        waiting->broken = event.capture->broken = true;
        *status = 902; // CUDA_ERROR_STREAM_CAPTURE_MERGE
    } else if (event.capture->broken)
        *status = CAPTURE_INVALIDATED;
    else { // the stream joins, or waits for one that joined
        captures[stream] = event.capture;
        if (!waiting && stream != event.capture->origin) event.capture->unjoined.insert(stream);
        if (stream == event.capture->origin) event.capture->unjoined.erase(event.stream);
    }
    return true;
}

extern "C" {
#pragma GCC visibility push(default)
int cuThreadExchangeStreamCaptureMode(int *mode) {
    if (*mode < GLOBAL || *mode > RELAXED) return INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return OK;
}
int cuStreamBeginCapture_v2(Handle handle, int mode) {
    std::lock_guard<std::mutex> guard(lock);
    note("capture begun");
    if (int status = sim_fault("cuStreamBeginCapture")) return status;
    if (mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
    if (current < 0) return INVALID_CONTEXT;
    if ((uintptr_t)handle < PER_THREAD_STREAM) return CAPTURE_UNSUPPORTED; // the legacy stream
    Stream stream = stream_of(handle);
    if (captures.count(stream)) return ILLEGAL_STATE;
    auto capture = std::make_shared<Capture>();
    capture->origin = stream;
    capture->mode = mode;
    capture->thread = thread_number();
    capture->recording->device = current;
    captures[stream] = capture;
    return OK;
}
int cuStreamIsCapturing(Handle handle, int *status) {
    std::lock_guard<std::mutex> guard(lock);
    auto capture = capture_of(stream_of(handle));
    *status = !capture ? 0 : capture->broken ? 2 : 1;
    return OK;
}
int cuStreamEndCapture(Handle handle, Handle *graph) {
    std::lock_guard<std::mutex> guard(lock);
    *graph = nullptr;
    Stream stream = stream_of(handle);
    auto capture = capture_of(stream);
    if (!capture || capture->origin != stream) return ILLEGAL_STATE;
    if (capture->mode != RELAXED && capture->thread != thread_number()) return CAPTURE_WRONG_THREAD;
    int fault = sim_fault("cuStreamEndCapture");
    end(capture);
    if (fault) return fault;
    if (capture->broken) return CAPTURE_INVALIDATED;
    if (!capture->unjoined.empty()) return CAPTURE_UNJOINED;
    *graph = new Graph{capture->recording};
    graphs.insert(*graph);
    return OK;
}
int cuGraphGetNodes(Handle graph, Handle *, size_t *count) {
    std::lock_guard<std::mutex> guard(lock);
    if (!graphs.count(graph)) return INVALID_HANDLE;
    *count = ((Graph *)graph)->recording->nodes.size();
    return OK;
}
int cuGraphDestroy(Handle graph) {
    std::lock_guard<std::mutex> guard(lock);
    if (!graphs.erase(graph)) return INVALID_HANDLE;
    delete (Graph *)graph;
    return OK;
}
int cuGraphInstantiateWithFlags(Handle *out, Handle graph, unsigned long long flags) {
    std::lock_guard<std::mutex> guard(lock);
    note("graph instantiated");
    if (int status = sim_fault("cuGraphInstantiate")) return status;
    if (!graphs.count(graph)) return INVALID_HANDLE;
    *out = new Executable{((Graph *)graph)->recording, (flags & 1) != 0};
    executables.insert(*out);
    return OK;
}
int cuGraphExecDestroy(Handle handle) {
    std::lock_guard<std::mutex> guard(lock);
    if (!executables.erase(handle)) return INVALID_HANDLE;
    auto *executable = (Executable *)handle;
    if (executable->holding) hold(executable->recording->device, -executable->recording->most);
    delete executable;
    return OK;
}
int cuGraphUpload(Handle handle, Handle) {
    std::lock_guard<std::mutex> guard(lock);
    note("graph upload");
    return executables.count(handle) ? OK : INVALID_HANDLE;
}
int cuGraphLaunch(Handle handle, Handle stream_handle) {
    std::shared_ptr<Recording> recording;
    Stream stream = stream_of(stream_handle);
    {
        std::lock_guard<std::mutex> guard(lock);
        bool known = executables.count(handle);
        note("graph launch", known ? ((Executable *)handle)->recording->nodes.size() : 0);
        if (int status = sim_fault("cuGraphLaunch")) return status;
        if (!known) return INVALID_HANDLE;
        if (captures.count(stream)) return CAPTURE_UNSUPPORTED; // as a part of another graph: not here
        auto *executable = (Executable *)handle;
        recording = executable->recording;
        if (recording->device != stream.first) return INVALID_VALUE;
        if (!executable->holding) {
            if (used_bytes(recording->device) + recording->most > card) return OUT_OF_MEMORY;
            hold(recording->device, recording->most);
            executable->holding = true;
        }
        for (Address p : recording->left)
            if (is_there(p)) {
                if (!executable->frees_itself) return INVALID_VALUE; // of the last launch, not freed since
                disappear(p, stream, "a graph's own free");
            }
        for (auto &a : recording->allocations)
            if (is_there(a.address)) sim_fail("cuGraphLaunch: the graph's memory is in use by another launch");
    }
    // All of it on the launching stream, in the order in which it was told.
    for (auto &node : recording->nodes) {
        sim_count(node.name.c_str(), node.units);
        if (int status = node.work(stream)) return status;
    }
    return OK;
}
#pragma GCC visibility pop
}
