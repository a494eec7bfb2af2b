// What a CUDA kernel's source needs to compile for the host: the language's words, the thread's coordinates, the
// 16-bit floats (every operation rounded to nearest even, as on the card), vector types, barriers and shuffles.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <cassert>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <math.h>
#include <stdint.h>

#define __CUDA_ARCH__ 800
#define SIMULATED_CARD // for what a source can only say in inline assembly: see "Tensor cores" below
#define __CUDA_ARCH_SIMULATED__ 1 // in place of tensor-core instructions, inline assembly and asynchronous copies: plain C++
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#ifndef __global__
#define __global__
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static // one block with barriers at a time: device.cpp holds a lock

struct SimIndex { unsigned x, y, z; };
struct SimThread { SimIndex thread, block, block_size, grid_size; };
extern __attribute__((visibility("hidden"), tls_model("initial-exec"))) thread_local SimThread sim_thread;
#define threadIdx sim_thread.thread
#define blockIdx sim_thread.block
#define blockDim sim_thread.block_size
#define gridDim sim_thread.grid_size
constexpr int warpSize = 32;

struct dim3 { unsigned x, y, z; dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {} };
struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// device.cpp
void sim_barrier();
void sim_exchange(const void *mine, void *theirs, int size, unsigned mask, int lane);
void *sim_dynamic_shared();
[[noreturn]] void sim_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int sim_lane();

inline void __syncthreads() { sim_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { int x = 0, y; sim_exchange(&x, &y, sizeof x, mask, sim_lane()); }
template <class T> T sim_shuffle(T value, unsigned mask, int lane) {
    T other;
    sim_exchange(&value, &other, sizeof value, mask, lane);
    return other;
}
// Lanes outside the group of `width` give the value back, as on the card.
template <class T> T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
    int lane = sim_lane(), to = lane ^ by;
    return sim_shuffle(value, mask, to / width > lane / width ? lane : to);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int lane = sim_lane(), to = lane + (int)by;
    return sim_shuffle(value, mask, to / width != lane / width ? lane : to);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int lane = sim_lane(), to = lane - (int)by;
    return sim_shuffle(value, mask, to < lane / width * width ? lane : to);
}
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return sim_shuffle(value, mask, sim_lane() / width * width + (from & (width - 1)));
}

template <class T> struct SimSameAs { using type = T; };
template <class T> using SimSame = typename SimSameAs<T>::type;
// One host thread runs a launch at a time, so plain operations are atomic within it.
template <class T> T atomicAdd(T *p, SimSame<T> v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicMax(T *p, SimSame<T> v) { T old = *p; *p = old < v ? v : old; return old; }
template <class T> T atomicMin(T *p, SimSame<T> v) { T old = *p; *p = v < old ? v : old; return old; }
template <class T> T atomicExch(T *p, SimSame<T> v) { T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T *p, SimSame<T> expected, SimSame<T> v) { T old = *p; if (old == expected) *p = v; return old; }
template <class T> T __ldg(const T *p) { return *p; }
inline void __threadfence() {} // blocks run one after the other

template <class To, class From> To sim_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return sim_bits<unsigned>(x); }
inline int __float_as_int(float x) { return sim_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return sim_bits<float>(x); }
inline float __int_as_float(int x) { return sim_bits<float>(x); }
inline long long __double_as_longlong(double x) { return sim_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return sim_bits<double>(x); }

template <class T> using SimNumber = std::enable_if_t<std::is_arithmetic_v<T>>;

struct __half {
    unsigned short bits;
    __half() = default;
    template <class T, class = SimNumber<T>> __half(T x) : bits(_cvtss_sh((float)x, 0)) {}
    operator float() const { return _cvtsh_ss(bits); }
};
struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    template <class T, class = SimNumber<T>> __nv_bfloat16(T x) {
        unsigned u = __float_as_uint((float)x);
        bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    __nv_bfloat16(__half x) : __nv_bfloat16((float)x) {}
    operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
#define SIM_ARITHMETIC(T)                                                                    \
    inline T operator+(T a, T b) { return (float)a + (float)b; }                             \
    inline T operator-(T a, T b) { return (float)a - (float)b; }                             \
    inline T operator*(T a, T b) { return (float)a * (float)b; }                             \
    inline T operator/(T a, T b) { return (float)a / (float)b; }                             \
    inline T operator-(T a) { a.bits ^= 0x8000; return a; }                                  \
    inline T &operator+=(T &a, T b) { return a = a + b; }                                    \
    inline T &operator-=(T &a, T b) { return a = a - b; }                                    \
    inline T &operator*=(T &a, T b) { return a = a * b; }                                    \
    inline T &operator/=(T &a, T b) { return a = a / b; }                                    \
    inline bool operator<(T a, T b) { return (float)a < (float)b; }                          \
    inline bool operator>(T a, T b) { return (float)a > (float)b; }                          \
    inline bool operator<=(T a, T b) { return (float)a <= (float)b; }                        \
    inline bool operator>=(T a, T b) { return (float)a >= (float)b; }                        \
    inline bool operator==(T a, T b) { return (float)a == (float)b; }                        \
    inline bool operator!=(T a, T b) { return (float)a != (float)b; }                        \
    inline bool __hisnan(T a) { return (float)a != (float)a; }                               \
    inline T __hmax_nan(T a, T b) { return __hisnan(a) || __hisnan(b) ? T(NAN) : a < b ? b : a; } \
    inline T __hmin_nan(T a, T b) { return __hisnan(a) || __hisnan(b) ? T(NAN) : b < a ? b : a; } \
    inline T __hmax(T a, T b) { return fmaxf(a, b); }                                        \
    inline T __hmin(T a, T b) { return fminf(a, b); }                                        \
    inline T __hadd(T a, T b) { return a + b; }                                              \
    inline T __hmul(T a, T b) { return a * b; }                                              \
    inline T __hfma(T a, T b, T c) { return fmaf(a, b, c); }                                 \
    inline T __habs(T a) { a.bits &= 0x7fff; return a; }                                     \
    inline T hsqrt(T a) { return sqrtf(a); }                                                 \
    inline T hrsqrt(T a) { return 1 / sqrtf(a); }                                            \
    inline T hcos(T a) { return cosf(a); }                                                   \
    inline T hsin(T a) { return sinf(a); }                                                   \
    inline T hexp(T a) { return expf(a); }                                                   \
    inline T hlog(T a) { return logf(a); }
SIM_ARITHMETIC(__half)
SIM_ARITHMETIC(__nv_bfloat16)
#define SIM_PAIR(P, OP, NAME) inline P NAME(P a, P b) { return {a.x OP b.x, a.y OP b.y}; }
SIM_PAIR(__nv_bfloat162, +, __hadd2) SIM_PAIR(__nv_bfloat162, -, __hsub2) SIM_PAIR(__nv_bfloat162, *, __hmul2)
SIM_PAIR(__nv_bfloat162, /, __h2div) SIM_PAIR(__half2, +, __hadd2) SIM_PAIR(__half2, -, __hsub2)
SIM_PAIR(__half2, *, __hmul2) SIM_PAIR(__half2, /, __h2div)
inline float __half2float(__half a) { return a; }
inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __half __ushort_as_half(unsigned short a) { __half h; h.bits = a; return h; }

// 8-bit floats only have to compile.
struct __half_raw {};
enum { __NV_E4M3 };
struct __nv_fp8_e4m3 {
    unsigned char __x;
    __nv_fp8_e4m3() = default;
    template <class T> explicit __nv_fp8_e4m3(T) { sim_fail("8-bit floats are not simulated"); }
};
inline __half __nv_cvt_fp8_to_halfraw(unsigned char, int) { sim_fail("8-bit floats are not simulated"); }

template <class A, class B> auto max(A a, B b) { using T = std::common_type_t<A, B>; return (T)a < (T)b ? (T)b : (T)a; }
template <class A, class B> auto min(A a, B b) { using T = std::common_type_t<A, B>; return (T)b < (T)a ? (T)b : (T)a; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }
namespace cuda { namespace std { using ::std::numeric_limits; } }

// Tensor cores. A warp's lanes lay down what they hold, and each works out its own part of the result.
struct SimFragments { unsigned a[4], b[2]; };
inline SimFragments *sim_warp_fragments() {
    static SimFragments all[1024]; // one block with barriers at a time
    const SimThread &t = sim_thread;
    return all + (t.thread.x + t.block_size.x * (t.thread.y + t.block_size.y * t.thread.z)) / 32 * 32;
}
template <class T> float sim_half_of(unsigned both, int high) {
    T value;
    value.bits = (unsigned short)(high ? both >> 16 : both);
    return value;
}
// mma.m16n8k16, float32 sums: lane 4g + t holds of a rows g, g + 8 and columns 2t, 2t + 1 (+ 8), of b rows 2t, 2t + 1 (+ 8) and
// column g, of d rows g, g + 8 and columns 2t, 2t + 1.
template <class T> void sim_mma_16x8x16(float d[4], const unsigned a[4], const unsigned b[2]) {
    SimFragments *warp = sim_warp_fragments();
    int lane = sim_lane(), g = lane / 4, t = lane % 4;
    memcpy(warp[lane].a, a, sizeof warp->a);
    memcpy(warp[lane].b, b, sizeof warp->b);
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        int row_half = i / 2, column = 2 * t + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++)
            sum += sim_half_of<T>(warp[4 * g + k % 8 / 2].a[row_half + 2 * (k / 8)], k % 2) *
                   sim_half_of<T>(warp[4 * column + k % 8 / 2].b[k / 8], k % 2);
        d[i] += sum;
    }
    __syncwarp();
}
// ldmatrix.x4: lane l gives where row l % 8 of 8 x 8 tile l / 8 lies, 16 bytes at a multiple of 16; it gets two neighbours of
// row l / 4 of every tile, or, transposed, of column l / 4.
inline void sim_ldmatrix(unsigned to[4], const void *row, bool transposed) {
    if ((uintptr_t)row % 16) sim_fail("ldmatrix: a row lies at no multiple of 16 bytes");
    static const unsigned short *rows[1024];
    const SimThread &thread = sim_thread;
    const unsigned short **warp = rows + (thread.thread.x + thread.block_size.x * (thread.thread.y + thread.block_size.y * thread.thread.z)) / 32 * 32;
    int lane = sim_lane(), g = lane / 4, t = lane % 4;
    warp[lane] = (const unsigned short *)row;
    __syncwarp();
    for (int tile = 0; tile < 4; tile++) {
        const unsigned short **tile_rows = warp + 8 * tile;
        unsigned low = transposed ? tile_rows[2 * t][g] : tile_rows[g][2 * t];
        unsigned high = transposed ? tile_rows[2 * t + 1][g] : tile_rows[g][2 * t + 1];
        to[tile] = low | high << 16;
    }
    __syncwarp();
}
inline void sim_ldmatrix_x4(unsigned to[4], const void *row) { sim_ldmatrix(to, row, false); }
inline void sim_ldmatrix_x4_trans(unsigned to[4], const void *row) { sim_ldmatrix(to, row, true); }

// Registration: the parameters of a launch are read as the kernel's own signature says.
struct SimKernel {
    const char *name;
    bool fibers; // the source has barriers or shuffles, so that the threads of a block take turns
    void (*one_thread)(void *const *parameters);
    void (*whole_block)(void *const *parameters);
    int count;
    unsigned pointers; // a bit for every parameter that is a pointer
    unsigned char sizes[32]; // bytes of each parameter
    char outputs[32];  // per parameter, what it is written as: f, h (float16), b (bfloat16), or 0
};
void sim_register(const SimKernel &kernel);

template <auto Function, class... A, size_t... I>
inline void sim_call(void (*)(A...), void *const *p, std::index_sequence<I...>) {
    Function(*(std::remove_cv_t<A> *)p[I]...);
}
template <auto Function, class... A> void sim_thread_of(void *const *p) {
    sim_call<Function>((void (*)(A...))Function, p, std::index_sequence_for<A...>());
}
extern const bool sim_reversed; // SIM_REVERSE: the last thread first
template <auto Function, class... A> void sim_block_of(void *const *p) {
    SimThread &t = sim_thread;
    unsigned x = t.block_size.x, y = t.block_size.y, count = x * y * t.block_size.z;
    for (unsigned n = 0; n < count; n++) {
        unsigned i = sim_reversed ? count - 1 - n : n;
        t.thread = {i % x, i / x % y, i / (x * y)};
        sim_call<Function>((void (*)(A...))Function, p, std::index_sequence_for<A...>());
    }
}
template <auto Function, class... A> struct SimRegister {
    SimRegister(const char *name, bool fibers, void (*)(A...)) {
        unsigned bits = 0, i = 0;
        ((bits |= (unsigned)std::is_pointer_v<A> << i++), ...);
        sim_register({name, fibers, sim_thread_of<Function, A...>, sim_block_of<Function, A...>, sizeof...(A), bits, {(unsigned char)sizeof(A)...},
                      {(std::is_same_v<A, float *> ? 'f' : std::is_same_v<A, __half *> ? 'h' : std::is_same_v<A, __nv_bfloat16 *> ? 'b' : 0)...}});
    }
};
template <auto Function, class... A> void sim_add(const char *name, bool fibers, void (*f)(A...)) {
    SimRegister<Function, A...>(name, fibers, f);
}
