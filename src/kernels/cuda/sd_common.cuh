// What the kernels share: the three float types, vectors of 16 bytes at most, activations. Sums are float32 everywhere.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using half_t = __half;
using bfloat_t = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat_t x) { return __bfloat162float(x); }

template <class T> struct Convert;
template <> struct Convert<float> {
    static __device__ __forceinline__ float from(float x) { return x; }
};
template <> struct Convert<half_t> {
    static __device__ __forceinline__ half_t from(float x) { return __float2half_rn(x); }
};
template <> struct Convert<bfloat_t> {
    static __device__ __forceinline__ bfloat_t from(float x) { return __float2bfloat16_rn(x); }
};
template <class T> __device__ __forceinline__ T from_float(float x) { return Convert<T>::from(x); }

// N values that are read and written as one; they lie at a multiple of their size.
template <class T, int N> struct alignas(sizeof(T) * N) Vector { T at[N]; };

template <class T, int N> __device__ __forceinline__ Vector<T, N> load(const T *from) {
    return *reinterpret_cast<const Vector<T, N> *>(from);
}
template <class T, int N> __device__ __forceinline__ void store(T *to, const Vector<T, N> &value) {
    *reinterpret_cast<Vector<T, N> *>(to) = value;
}

// As `Activation` in src/kernels/cuda/mod.rs numbers them.
enum { NONE = 0, GELU = 1, SILU = 2, QUICK_GELU = 3, RELU = 4 };

__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case SILU: return x / (1.0f + expf(-x));
        case QUICK_GELU: return x / (1.0f + expf(-1.702f * x));
        case RELU: return x < 0.0f ? 0.0f : x; // what is not a number stays so
        default: return x;
    }
}
