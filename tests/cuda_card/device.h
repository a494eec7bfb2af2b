// Between the parts of the simulator: launches, device memory, counters.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

struct SimKernel;
const SimKernel *sim_find(const char *name);
void sim_launch(const SimKernel &kernel, const unsigned grid[3], const unsigned block[3], size_t shared, void *const *parameters);

// Every piece of device memory that a call works on: it must be live, of this device, and not in use on another stream.
void sim_touch(const char *who, int argument, const void *pointer, size_t bytes = 0);
// A library's calls work on the stream that its handle was given: while this lives, sim_touch and sim_enqueue mean that
// one, and else the thread's own.
struct SimOnStream {
    explicit SimOnStream(void *stream);
    ~SimOnStream();
    std::pair<int, uintptr_t> before;
};
// The end of a library's call whose arguments are found right: counts `name` and does `work` at once, or, while the
// stream captures a graph, keeps both for every launch of the graph. What `work` uses it must own (no references to the
// call's arguments, no descriptors, no scalars on the host): it may run later. Touches (sim_touch) belong into it.
// Answers the status to return: what SIM_FAULT asks for, else 0.
int sim_enqueue(const char *name, uint64_t units, std::function<void()> work);
// The status to return in place of working, where SIM_FAULT=FUNCTION:STATUS:NTH says so; else 0.
int sim_fault(const char *function);
bool sim_flag(const char *variable);
// SIM_FINITE: tells of an output that is not finite; `type` f, h or b; no bytes: to the end of the allocation.
void sim_check_finite(const char *who, char type, const void *pointer, size_t bytes = 0);
void sim_count(const char *name, uint64_t units);

struct SimTimer { // CPU time by kind of work
    explicit SimTimer(int kind);
    ~SimTimer();
    int kind;
    double start;
};
enum { SIM_KERNELS, SIM_GEMM, SIM_CONV };

// C = alpha A B + beta C, single matrices in row-major float32, used by cuBLAS and cuDNN alike: C (m, n), A (m, k), B (k, n).
void sim_gemm(int m, int n, int k, const float *a, const float *b, float *c);
