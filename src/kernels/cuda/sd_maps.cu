// Elementwise work and work on the places of a map: activations, layouts, padding, resampling, the sampler's ends.
// No thread waits for another here. Maps are (b, h, w, c); N divides c.
#include "sd_common.cuh"

// y = act(x), count values; N divides count.
template <class T, int N> __device__ void activation(const T *x, T *y, size_t count, int kind) {
    const size_t vectors = count / N, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
        Vector<T, N> values = load<T, N>(x + i * N);
        for (int j = 0; j < N; j++) values.at[j] = from_float<T>(activate(to_float(values.at[j]), kind));
        store<T, N>(y + i * N, values);
    }
}

// x (rows, 2 * width), the values of a row and then their gates -> y (rows, width), value * act(gate); N divides width.
template <class T, int N> __device__ void gate(const T *x, T *y, size_t rows, int width, int kind) {
    const int columns = width / N;
    const size_t vectors = rows * columns, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
        const T *from = x + i / columns * 2 * width + i % columns * N;
        Vector<T, N> values = load<T, N>(from);
        const Vector<T, N> gates = load<T, N>(from + width);
        for (int j = 0; j < N; j++)
            values.at[j] = from_float<T>(to_float(values.at[j]) * activate(to_float(gates.at[j]), kind));
        store<T, N>(y + i * N, values);
    }
}

// a (places, first), b (places, second) -> y (places, first + second); N divides both.
template <class T, int N>
__device__ void concatenate(const T *a, const T *b, T *y, size_t places, int first, int second) {
    const int columns = (first + second) / N;
    const size_t vectors = places * columns, step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
        const size_t place = i / columns;
        const int channel = (int)(i % columns) * N;
        const T *from = channel < first ? a + place * first + channel : b + place * second + channel - first;
        store<T, N>(y + i * N, load<T, N>(from));
    }
}

// x (b, h, w, c) -> y (b, 2h, 2w, c), every value four times. Grid (any, 2h, b).
template <class T, int N> __device__ void repeat_2x(const T *x, T *y, int h, int w, int c) {
    const unsigned columns = c / N, vectors = 2 * w * columns, line = blockIdx.y;
    const T *from = x + ((size_t)blockIdx.z * h + line / 2) * w * c;
    T *to = y + ((size_t)blockIdx.z * 2 * h + line) * 2 * w * c;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x)
        store<T, N>(to + (size_t)i * N, load<T, N>(from + (size_t)(i / columns / 2) * c + i % columns * N));
}

// x (b, h, w, c) -> y (b, h + before + after, w + before + after, c), zeros around. Grid (any, height of y, b).
template <class T, int N> __device__ void pad(const T *x, T *y, int h, int w, int c, int before, int after) {
    const unsigned columns = c / N, wide = w + before + after, vectors = wide * columns;
    const int from_line = (int)blockIdx.y - before;
    T *to = y + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * wide * c;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const int from_column = (int)(i / columns) - before;
        Vector<T, N> values;
        for (int j = 0; j < N; j++) values.at[j] = from_float<T>(0.0f);
        if (from_line >= 0 && from_line < h && from_column >= 0 && from_column < w)
            values = load<T, N>(x + (((size_t)blockIdx.z * h + from_line) * w + from_column) * c + i % columns * N);
        store<T, N>(to + (size_t)i * N, values);
    }
}

// A place one beyond either end, mirrored about the edge.
__device__ __forceinline__ int reflected(int i, int n) { return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i; }

// x (b, h, w, c) -> y (b, h / 2, w / 2, c), by [1, 3, 3, 1] / 8 in each direction. Grid (any, h / 2, b).
template <class T, int N> __device__ void downsample(const T *x, T *y, int h, int w, int c) {
    const float weights[4] = {0.125f, 0.375f, 0.375f, 0.125f};
    const unsigned columns = c / N, vectors = w / 2 * columns;
    const T *map = x + (size_t)blockIdx.z * h * w * c;
    T *to = y + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * (w / 2) * c;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const int place = i / columns, channel = i % columns * N;
        float sums[N] = {};
        for (int dy = 0; dy < 4; dy++) {
            const int line = reflected(2 * (int)blockIdx.y - 1 + dy, h);
            for (int dx = 0; dx < 4; dx++) {
                const int column = reflected(2 * place - 1 + dx, w);
                const Vector<T, N> values = load<T, N>(map + ((size_t)line * w + column) * c + channel);
                for (int j = 0; j < N; j++) sums[j] += weights[dy] * weights[dx] * to_float(values.at[j]);
            }
        }
        Vector<T, N> values;
        for (int j = 0; j < N; j++) values.at[j] = from_float<T>(sums[j]);
        store<T, N>(to + (size_t)i * N, values);
    }
}

// x (b, h, w, c) -> y (b, 2h, 2w, c), by the transposed convolution with [1, 3, 3, 1] / 4 in each direction.
// Grid (any, 2h, b).
template <class T, int N> __device__ void upsample(const T *x, T *y, int h, int w, int c) {
    const unsigned columns = c / N, vectors = 2 * w * columns;
    const T *map = x + (size_t)blockIdx.z * h * w * c;
    T *to = y + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * 2 * w * c;
    const int lines[2] = {(int)blockIdx.y / 2, reflected((int)blockIdx.y / 2 + (blockIdx.y % 2 ? 1 : -1), h)};
    const float weights[2] = {0.75f, 0.25f};
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        const int place = i / columns, channel = i % columns * N;
        const int places[2] = {place / 2, reflected(place / 2 + (place % 2 ? 1 : -1), w)};
        float sums[N] = {};
        for (int dy = 0; dy < 2; dy++)
            for (int dx = 0; dx < 2; dx++) {
                const Vector<T, N> values = load<T, N>(map + ((size_t)lines[dy] * w + places[dx]) * c + channel);
                for (int j = 0; j < N; j++) sums[j] += weights[dy] * weights[dx] * to_float(values.at[j]);
            }
        Vector<T, N> values;
        for (int j = 0; j < N; j++) values.at[j] = from_float<T>(sums[j]);
        store<T, N>(to + (size_t)i * N, values);
    }
}

// Planes to a map: first (b, c1, positions) times scale and second (b, c2, positions), float32 -> y (rows, positions, c1 + c2).
// Row r of y is of row r % b. second may be null where c2 is 0. Grid (any, rows).
template <class T>
__device__ void planes_to_map(const float *first, const float *second, T *y, float scale, int b, int c1, int c2,
                              int positions) {
    const unsigned channels = c1 + c2, count = channels * (unsigned)positions, row = blockIdx.y % b;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const unsigned channel = i % channels, position = i / channels;
        const float value = channel < (unsigned)c1
                                ? scale * first[((size_t)row * c1 + channel) * positions + position]
                                : second[((size_t)row * c2 + channel - c1) * positions + position];
        y[(size_t)blockIdx.y * count + i] = from_float<T>(value);
    }
}

// A map to planes: x (b, positions, c) -> y (b, c, positions), float32. Grid (any, b).
template <class T> __device__ void map_to_planes(const T *x, float *y, int c, int positions) {
    const unsigned count = (unsigned)c * positions;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        y[(size_t)blockIdx.y * count + i] = to_float(x[(size_t)blockIdx.y * count + (size_t)(i % positions) * c + i / positions]);
}

// What the network says of the noisy latents x (b, c, positions), float32, as latents without noise, of that shape:
// skip * x + factor * output, output (prompts * b, positions, outputs) with outputs >= c. Of two prompts the first is the
// negative one: their results are joined as first + guidance * (second - first). Grid (any, b).
template <class T>
__device__ void denoised(const float *x, const T *output, float *y, float skip, float factor, float guidance, int prompts,
                         int c, int outputs, int positions) {
    const unsigned count = (unsigned)c * positions;
    const size_t next = (size_t)gridDim.y * positions * outputs;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const size_t at = (size_t)blockIdx.y * count + i;
        const T *from = output + ((size_t)blockIdx.y * positions + i % positions) * outputs + i / positions;
        const float kept = skip * x[at];
        float value = kept + factor * to_float(from[0]);
        if (prompts == 2) value += guidance * (kept + factor * to_float(from[next]) - value);
        y[at] = value;
    }
}

// condition (b, 2 * count) plus the cosines and sines of frequencies (count) * angle, the cosines first or second.
// Grid (any, b).
template <class T>
__device__ void time_features(const T *condition, const float *frequencies, T *y, float angle, int count, int cosine_first) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < 2 * count; i += gridDim.x * blockDim.x) {
        const float x = frequencies[i % count] * angle;
        const float feature = (i < count) == (cosine_first != 0) ? cosf(x) : sinf(x);
        const size_t at = (size_t)blockIdx.y * 2 * count + i;
        y[at] = from_float<T>(to_float(condition[at]) + feature);
    }
}

#define VECTORS(T, NAME, N)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) sd_activation_##NAME##_##N(const T *x, T *y, size_t count,          \
                                                                                int kind) {                              \
        activation<T, N>(x, y, count, kind);                                                                              \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_gate_##NAME##_##N(const T *x, T *y, size_t rows, int width,      \
                                                                          int kind) {                                    \
        gate<T, N>(x, y, rows, width, kind);                                                                              \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_concatenate_##NAME##_##N(                                        \
        const T *a, const T *b, T *y, size_t places, int first, int second) {                                             \
        concatenate<T, N>(a, b, y, places, first, second);                                                                \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_repeat_2x_##NAME##_##N(const T *x, T *y, int h, int w, int c) {  \
        repeat_2x<T, N>(x, y, h, w, c);                                                                                   \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_pad_##NAME##_##N(const T *x, T *y, int h, int w, int c,          \
                                                                         int before, int after) {                        \
        pad<T, N>(x, y, h, w, c, before, after);                                                                          \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_downsample_##NAME##_##N(const T *x, T *y, int h, int w, int c) { \
        downsample<T, N>(x, y, h, w, c);                                                                                  \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_upsample_##NAME##_##N(const T *x, T *y, int h, int w, int c) {   \
        upsample<T, N>(x, y, h, w, c);                                                                                    \
    }
#define SCALARS(T, NAME)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) sd_planes_to_map_##NAME(                                            \
        const float *first, const float *second, T *y, float scale, int b, int c1, int c2, int positions) {               \
        planes_to_map<T>(first, second, y, scale, b, c1, c2, positions);                                                  \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_map_to_planes_##NAME(const T *x, float *y, int c,                \
                                                                             int positions) {                            \
        map_to_planes<T>(x, y, c, positions);                                                                             \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_denoised_##NAME(                                                 \
        const float *x, const T *output, float *y, float skip, float factor, float guidance, int prompts, int c,          \
        int outputs, int positions) {                                                                                     \
        denoised<T>(x, output, y, skip, factor, guidance, prompts, c, outputs, positions);                                \
    }                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) sd_time_features_##NAME(                                            \
        const T *condition, const float *frequencies, T *y, float angle, int count, int cosine_first) {                   \
        time_features<T>(condition, frequencies, y, angle, count, cosine_first);                                          \
    }

VECTORS(float, f32, 1)
VECTORS(float, f32, 2)
VECTORS(float, f32, 4)
VECTORS(half_t, f16, 1)
VECTORS(half_t, f16, 2)
VECTORS(half_t, f16, 4)
VECTORS(half_t, f16, 8)
VECTORS(bfloat_t, bf16, 1)
VECTORS(bfloat_t, bf16, 2)
VECTORS(bfloat_t, bf16, 4)
VECTORS(bfloat_t, bf16, 8)
SCALARS(float, f32)
SCALARS(half_t, f16)
SCALARS(bfloat_t, bf16)
