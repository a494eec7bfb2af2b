// Group and layer normalisation. A group norm is two kernels: one reads the map once and leaves a factor and an addend per
// (row, channel), the other applies them and an activation.
#include "sd_common.cuh"

// The sum of a value over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

struct GroupNormShape {
    int positions;         // h * w
    int channels;
    int groups;
    int groups_a_block;    // groups that one block sums up, side by side
    int chunk;             // positions that one block sums up
    int scale_stride;      // from one row of scale and shift to the next: 0 where all rows share one
    float eps;
};

// x (b, positions, channels) -> affine (b, 2, channels): norm(x) * scale + shift = x * affine[0] + affine[1].
// Grid (chunks, blocks of groups, b), 256 threads. N divides the channels of a group. Each block sums up its positions with
// values taken relative to the first one of the group, so that a large mean costs no digits, and writes mean and sum of
// squares about it to partial (b, chunks, groups, 2); the last block of a row joins them (Chan et al., 1979).
// tickets (b) are zero before and after.
template <class T, int N>
__device__ void group_norm_statistics(const T *x, const float *scale, const float *shift, float *partial,
                                      unsigned *tickets, float *affine, GroupNormShape shape) {
    __shared__ float sums[256], squares[256];
    __shared__ bool last;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = blockIdx.z;
    const int size = shape.channels / shape.groups;
    const int first_group = blockIdx.y * shape.groups_a_block;
    const int groups = min(shape.groups_a_block, shape.groups - first_group);
    const int vectors_a_group = size / N, vectors = groups * vectors_a_group;
    const int columns = min(vectors, 256), lines = 256 / columns;
    const int column = thread % columns, line = thread / columns;
    const int start = blockIdx.x * shape.chunk, end = min(start + shape.chunk, shape.positions);
    const T *map = x + (size_t)row * shape.positions * shape.channels + first_group * size;

    float sum = 0, square = 0;
    if (line < lines) {
        // More columns than threads only where a block has one group: then every value is of it.
        const int group = groups == 1 ? 0 : column / vectors_a_group;
        const float pivot = to_float(map[(size_t)start * shape.channels + group * size]);
        for (int position = start + line; position < end; position += lines)
            for (int vector = column; vector < vectors; vector += columns) {
                const Vector<T, N> values = load<T, N>(map + (size_t)position * shape.channels + vector * N);
                for (int i = 0; i < N; i++) {
                    const float difference = to_float(values.at[i]) - pivot;
                    sum += difference;
                    square += difference * difference;
                }
            }
    }
    sums[thread] = sum;
    squares[thread] = square;
    __syncthreads();

    const int columns_a_group = groups == 1 ? columns : vectors_a_group;
    const float count = (float)(end - start) * size;
    for (int group = warp; group < groups; group += 8) {
        float s = 0, q = 0;
        for (int i = lane; i < columns_a_group * lines; i += 32) {
            const int at = i / columns_a_group * columns + group * columns_a_group + i % columns_a_group;
            s += sums[at];
            q += squares[at];
        }
        s = warp_sum(s);
        q = warp_sum(q);
        if (lane == 0) {
            const float pivot = to_float(map[(size_t)start * shape.channels + group * size]);
            float *out = partial + (((size_t)row * gridDim.x + blockIdx.x) * shape.groups + first_group + group) * 2;
            out[0] = pivot + s / count;
            out[1] = fmaxf(q - s * s / count, 0.0f);
        }
    }
    __threadfence();
    __syncthreads();
    if (thread == 0) last = atomicAdd(&tickets[row], 1u) == gridDim.x * gridDim.y - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();

    // Volatile: what other blocks wrote is not to come from this block's cache.
    const volatile float *parts = partial + (size_t)row * gridDim.x * shape.groups * 2;
    const int chunks = gridDim.x;
    const float all = (float)shape.positions * size;
    for (int group = warp; group < shape.groups; group += 8) {
        auto size_of = [&](int chunk) { return (float)(min(shape.chunk, shape.positions - chunk * shape.chunk) * size); };
        float mean = 0;
        for (int chunk = lane; chunk < chunks; chunk += 32)
            mean += parts[(chunk * shape.groups + group) * 2] * (size_of(chunk) / all);
        mean = warp_sum(mean);
        float squared = 0;
        for (int chunk = lane; chunk < chunks; chunk += 32) {
            const float apart = parts[(chunk * shape.groups + group) * 2] - mean;
            squared += parts[(chunk * shape.groups + group) * 2 + 1] + size_of(chunk) * apart * apart;
        }
        const float inverse = 1.0f / sqrtf(warp_sum(squared) / all + shape.eps);
        for (int i = lane; i < size; i += 32) {
            const int channel = group * size + i;
            const size_t weights = (size_t)row * shape.scale_stride + channel;
            const float factor = inverse * scale[weights];
            affine[(size_t)row * 2 * shape.channels + channel] = factor;
            affine[((size_t)row * 2 + 1) * shape.channels + channel] = shift[weights] - mean * factor;
        }
    }
    if (thread == 0) tickets[row] = 0;
}

// x (b, positions, channels) -> y of that shape: act(x * affine[0] + affine[1]). Grid (any, b); N divides channels; x and y
// may be one.
template <class T, int N>
__device__ void group_norm_apply(const T *x, const float *affine, T *y, int positions, int channels, int activation) {
    const unsigned columns = channels / N, vectors = columns * (unsigned)positions;
    const float *factors = affine + (size_t)blockIdx.y * 2 * channels, *addends = factors + channels;
    const size_t start = (size_t)blockIdx.y * positions * channels;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const unsigned channel = i % columns * N;
        Vector<T, N> values = load<T, N>(x + start + (size_t)i * N);
        const Vector<float, N> factor = load<float, N>(factors + channel), addend = load<float, N>(addends + channel);
        for (int j = 0; j < N; j++)
            values.at[j] = from_float<T>(activate(to_float(values.at[j]) * factor.at[j] + addend.at[j], activation));
        store<T, N>(y + start + (size_t)i * N, values);
    }
}

// x (rows, size) -> y of that shape; a warp a row. weight, bias (size).
template <class T>
__device__ void layer_norm(const T *x, const T *weight, const T *bias, T *y, int rows, int size, float eps) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const T *from = x + (size_t)row * size;
    float sum = 0;
    for (int i = lane; i < size; i += 32) sum += to_float(from[i]);
    const float mean = warp_sum(sum) / size;
    float squares = 0;
    for (int i = lane; i < size; i += 32) squares += (to_float(from[i]) - mean) * (to_float(from[i]) - mean);
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / size + eps);
    for (int i = lane; i < size; i += 32)
        y[(size_t)row * size + i] = from_float<T>((to_float(from[i]) - mean) * inverse * to_float(weight[i]) + to_float(bias[i]));
}

#define STATISTICS(T, NAME, N)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) sd_group_norm_statistics_##NAME##_##N(                              \
        const T *x, const float *scale, const float *shift, float *partial, unsigned *tickets, float *affine,             \
        GroupNormShape shape) {                                                                                           \
        group_norm_statistics<T, N>(x, scale, shift, partial, tickets, affine, shape);                                    \
    }
#define APPLY(T, NAME, N)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) sd_group_norm_apply_##NAME##_##N(                                   \
        const T *x, const float *affine, T *y, int positions, int channels, int activation) {                             \
        group_norm_apply<T, N>(x, affine, y, positions, channels, activation);                                            \
    }
#define LAYER_NORM(T, NAME)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) sd_layer_norm_##NAME(const T *x, const T *weight, const T *bias,    \
                                                                          T *y, int rows, int size, float eps) {         \
        layer_norm<T>(x, weight, bias, y, rows, size, eps);                                                               \
    }
#define FOR_WIDTHS(T, NAME)                                                                                               \
    STATISTICS(T, NAME, 1) STATISTICS(T, NAME, 2) STATISTICS(T, NAME, 4)                                                  \
    APPLY(T, NAME, 1) APPLY(T, NAME, 2) APPLY(T, NAME, 4) LAYER_NORM(T, NAME)

FOR_WIDTHS(float, f32)
FOR_WIDTHS(half_t, f16)
FOR_WIDTHS(bfloat_t, bf16)
STATISTICS(half_t, f16, 8)
STATISTICS(bfloat_t, bf16, 8)
APPLY(half_t, f16, 8)
APPLY(bfloat_t, bf16, 8)
