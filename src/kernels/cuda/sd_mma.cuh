// The tensor cores' instructions, a function each. The simulated card of the tests has them in plain C++ (SIMULATED_CARD).
//
// Fragments of a 16 x 8 x 16 product, as PTX lays them out, for lane = 4 * g + t: a[0] is row g, columns 2t and 2t + 1;
// a[1] row g + 8; a[2], a[3] the same 8 columns on. b[0] is rows 2t and 2t + 1, column g; b[1] 8 rows below. d[0], d[1] are
// row g, columns 2t and 2t + 1; d[2], d[3] row g + 8.
#pragma once
#include "sd_common.cuh"

// Two neighbours as one register, the first in the low half.
__device__ __forceinline__ unsigned pair(half_t low, half_t high) {
    return (unsigned)__half_as_ushort(low) | (unsigned)__half_as_ushort(high) << 16;
}
__device__ __forceinline__ unsigned pair(bfloat_t low, bfloat_t high) {
    return (unsigned)__bfloat16_as_ushort(low) | (unsigned)__bfloat16_as_ushort(high) << 16;
}
template <class T> __device__ __forceinline__ unsigned pair_of(float low, float high) {
    return pair(from_float<T>(low), from_float<T>(high));
}

#ifdef SIMULATED_CARD
template <class T> __device__ void multiply(float d[4], const unsigned a[4], const unsigned b[2]) { sim_mma_16x8x16<T>(d, a, b); }
// Four 8 x 8 tiles of 16-bit values, transposed: lane l gives the address of row l % 8 of tile l / 8.
__device__ inline void load_transposed(unsigned to[4], const void *row) { sim_ldmatrix_x4_trans(to, row); }
__device__ inline void load_tiles(unsigned to[4], const void *row) { sim_ldmatrix_x4(to, row); }
#else
// d += a b, products and sums in float32.
template <class T> __device__ __forceinline__ void multiply(float d[4], const unsigned a[4], const unsigned b[2]);
template <> __device__ __forceinline__ void multiply<half_t>(float d[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
template <> __device__ __forceinline__ void multiply<bfloat_t>(float d[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap(); // refused before a launch: bfloat16 needs a card of capability 8.0
#endif
}
__device__ __forceinline__ void load_transposed(unsigned to[4], const void *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address) : "memory");
}
__device__ __forceinline__ void load_tiles(unsigned to[4], const void *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address) : "memory");
}
#endif
