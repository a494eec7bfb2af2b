// Within the driver: streams, counters, device memory (memory.cpp), graphs (graphs.cpp), entry points (driver.cpp).
#pragma once
#include "device.h"
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

// Statuses, by the names that cuda.h has for them.
enum Status {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400, ILLEGAL_STATE = 401, NOT_FOUND = 500, NOT_READY = 600, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907, CAPTURE_WRONG_THREAD = 908,
};

using Handle = void *;
using Address = uint64_t;
using Stream = std::pair<int, uintptr_t>; // device; handle, or 1000000 + thread where that means "this thread's own"
constexpr uintptr_t PER_THREAD_STREAM = 2, THREADS = 1000000;

uint64_t number(const char *variable, uint64_t otherwise);
extern const int devices;
extern const uint64_t card; // bytes a card has
extern const bool skipping;
extern std::mutex lock;     // of all below but where said
extern thread_local int current; // device, or -1
int thread_number();
Stream stream_of(Handle);
void note(const char *name, uint64_t units = 0);
// SIM_STATS=2: `bytes` of device memory that a call of `name` may read or write.
void note_moved(const std::string &name, uint64_t units, uint64_t bytes);

// ---- memory.cpp
int allocate(Address *out, size_t bytes, Stream);
int release(Address, Stream, const char *who);
uint64_t used_bytes(int device), peak_bytes(int device);
// The call `who` works on memory, of which `bytes` must be there. Answers how many there are from `p` to its end.
size_t touch(const char *who, int argument, uintptr_t p, size_t bytes, Stream);
bool span(uintptr_t p, size_t *bytes); // from `p` to the end of its allocation
void always_ordered(Address);          // no stream waits for its allocation
// What is told up to now on a stream, and what that stream had seen of others.
using Clock = std::map<Stream, uint64_t>;
Clock clock_of(Stream);
void wait_for(Stream, const Clock &);
void host_awaits(Stream);
void host_awaits(const Clock &);
void host_awaits_device();
// Memory of a graph: made while capturing, there from its allocation to its release in every launch.
Address reserve(size_t bytes, Stream);
void appear(Address, Stream);
void disappear(Address, Stream, const char *who);
void give_back(Address);
bool is_there(Address);
void hold(int device, int64_t bytes); // counted as used: a graph's memory

// Memory that outlives its graph is as any other from then on.
void keep(Address);

// ---- graphs.cpp
using Work = std::function<int(Stream)>; // told the stream on which it is done
// Does `work` on a stream: at once, or, while the stream captures, at every launch of its graph. Counts `name` when it is
// done; `fault` is what SIM_FAULT calls it. The lock must be free; `work` takes it as it needs.
int submit(Stream, const std::string &name, uint64_t units, const char *fault, Work work);
bool capturing(Stream);
// A call that waits for a stream (or, without one, for the device) or asks how far it is: refused where that captures.
int refused_while_capturing(const Stream *);
// A call that may wait within the driver, such as cuMemAlloc: refused by the mode of a capture.
int refused_as_unsafe();
int capture_allocation(Address *out, size_t bytes, Stream);
int capture_release(Address, Stream);
struct Capture;
struct Event {
    bool timed, recorded = false;
    double seconds = 0;
    Clock clock;
    std::shared_ptr<Capture> capture; // recorded within this, on `stream`
    Stream stream;
};
int capture_event(Event &, Stream);
// Whether a stream's wait for an event is a matter of a capture; its status then.
bool capture_wait(Stream, Event &, int *status);
