// Kernels for selftest.py: one with a barrier, and one that lacks it.

extern "C" __global__ void selftest_reversed(const float *x, float *y) {
    extern __shared__ float values[];
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void selftest_reversed_too_early(const float *x, float *y) {
    extern __shared__ float values[];
    values[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
}
