// Convolution as a matrix product whose left side is read from the map as it is needed (implicit GEMM), sums in float32.
#include "sd_mma.cuh"

struct ConvShape {
    int h, w, inputs;             // of the map as it is stored
    int out_h, out_w, outputs;
    int kernel_h, kernel_w;
    int stride, before;           // zeros above and left; those below and right follow from the output's size
    int enlarge;                  // 2 where the map is read as if every value were there twice in each direction, else 1
    int rows;                     // b * out_h * out_w
    int activation;               // of the sum of products, bias and residual
    int wide;                     // a place of the output read in 16 bytes: inputs is a multiple of 8 (sd_conv2d_tiles)
};

// Where a row of the product lies: the output's place, as the map's corner that its window starts at.
struct Window {
    int batch, y, x;
};
__device__ __forceinline__ Window window_of(int row, const ConvShape &shape) {
    const int place = row % (shape.out_h * shape.out_w);
    return {row / (shape.out_h * shape.out_w), place / shape.out_w * shape.stride - shape.before,
            place % shape.out_w * shape.stride - shape.before};
}
// The map's values under position `tap` of a window, or null where they are zeros.
template <class T>
__device__ __forceinline__ const T *under(const T *x, const Window &window, int tap, const ConvShape &shape) {
    const int y = window.y + tap / shape.kernel_w, column = window.x + tap % shape.kernel_w;
    if (y < 0 || column < 0 || y >= shape.h * shape.enlarge || column >= shape.w * shape.enlarge) return nullptr;
    return x + (((size_t)window.batch * shape.h + y / shape.enlarge) * shape.w + column / shape.enlarge) * shape.inputs;
}

template <class T>
__device__ __forceinline__ void finish(T *y, const T *bias, const T *residual, float sum, int row, int output,
                                       const ConvShape &shape) {
    if (row >= shape.rows || output >= shape.outputs) return;
    const size_t at = (size_t)row * shape.outputs + output;
    if (bias) sum += to_float(bias[output]);
    if (residual) sum += to_float(residual[at]);
    y[at] = from_float<T>(activate(sum, shape.activation));
}

// x (b, h, w, inputs), filter (outputs, kernel_h, kernel_w, inputs), bias (outputs) or null, residual as y or null ->
// y (b, out_h, out_w, outputs). Grid (rows / 64, outputs / 64, both rounded up), 256 threads: 64 x 64 of the output, 4 x 4 each.
template <class T>
__device__ void conv2d(const T *x, const T *filter, const T *bias, const T *residual, T *y, ConvShape shape) {
    constexpr int TILE = 64, DEPTH = 16;
    __shared__ float left[DEPTH][TILE + 1], right[DEPTH][TILE + 1];
    const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
    const int first_row = blockIdx.x * TILE, first_output = blockIdx.y * TILE;
    const int depth = shape.kernel_h * shape.kernel_w * shape.inputs;
    Window windows[4];
    for (int i = 0; i < 4; i++) windows[i] = window_of(min(first_row + ty + 16 * i, shape.rows - 1), shape);

    float sums[4][4] = {};
    for (int start = 0; start < depth; start += DEPTH) {
        const int k = start + tx;
        __syncthreads();
        for (int i = 0; i < 4; i++) {
            float value = 0, weight = 0;
            if (k < depth) {
                if (const T *values = under(x, windows[i], k / shape.inputs, shape)) value = to_float(values[k % shape.inputs]);
                const int output = first_output + ty + 16 * i;
                if (output < shape.outputs) weight = to_float(filter[(size_t)output * depth + k]);
            }
            left[tx][ty + 16 * i] = value;
            right[tx][ty + 16 * i] = weight;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += left[d][ty + 16 * i] * right[d][tx + 16 * j];
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            finish(y, bias, residual, sums[i][j], first_row + ty + 16 * i, first_output + tx + 16 * j, shape);
}

// The same on tensor cores. Grid (rows / 128, outputs / 64, both rounded up), 256 threads: eight warps of 32 x 32 of the output.
template <class T>
__device__ void conv2d_tiles(const T *x, const T *filter, const T *bias, const T *residual, T *y, ConvShape shape) {
    constexpr int ROWS = 128, OUTPUTS = 64, DEPTH = 32, LINE = DEPTH + 8;
    __shared__ __align__(16) T left[ROWS * LINE];
    __shared__ __align__(16) T right[OUTPUTS * LINE];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * ROWS, first_output = blockIdx.y * OUTPUTS;
    const int row = warp / 2 * 32, column = warp % 2 * 32;
    const int depth = shape.kernel_h * shape.kernel_w * shape.inputs;
    const int tile_row = lane % 16, tile_column = lane / 16 * 8;
    // Of every 8 values along the depth that a thread brings: two rows of the left side, one of the right.
    const int line = thread / 4, part = thread % 4 * 8;
    Window windows[2];
    for (int i = 0; i < 2; i++) windows[i] = window_of(min(first_row + line + 64 * i, shape.rows - 1), shape);
    const T *weights = filter + (size_t)min(first_output + line, shape.outputs - 1) * depth;

    auto zeros = [&] {
        Vector<T, 8> values;
        for (int j = 0; j < 8; j++) values.at[j] = from_float<T>(0.0f);
        return values;
    };
    float sums[2][4][4] = {};
    for (int start = 0; start < depth; start += DEPTH) {
        const int k = start + part;
        Vector<T, 8> values[2] = {zeros(), zeros()}, weight = zeros();
        if (shape.wide) {
            if (k < depth) {
                const int tap = k / shape.inputs;
                for (int i = 0; i < 2; i++)
                    if (const T *from = under(x, windows[i], tap, shape)) values[i] = load<T, 8>(from + k - tap * shape.inputs);
                weight = load<T, 8>(weights + k);
            }
        } else {
            for (int j = 0; j < 8 && k + j < depth; j++) {
                const int tap = (k + j) / shape.inputs;
                for (int i = 0; i < 2; i++)
                    if (const T *from = under(x, windows[i], tap, shape)) values[i].at[j] = from[k + j - tap * shape.inputs];
                weight.at[j] = weights[k + j];
            }
        }
        __syncthreads();
        store<T, 8>(left + line * LINE + part, values[0]);
        store<T, 8>(left + (line + 64) * LINE + part, values[1]);
        store<T, 8>(right + line * LINE + part, weight);
        __syncthreads();
#pragma unroll
        for (int step = 0; step < DEPTH; step += 16) {
            unsigned a[2][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_tiles(a[i], left + (row + 16 * i + tile_row) * LINE + step + tile_column);
                load_tiles(b[i], right + (column + 16 * i + lane / 16 * 8 + lane % 8) * LINE + step + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) multiply<T>(sums[i][j], a[i], b[j / 2] + j % 2 * 2);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                finish(y, bias, residual, sums[i][j][n], first_row + row + 16 * i + g + n / 2 * 8,
                       first_output + column + 8 * j + 2 * t + n % 2, shape);
}

#define CONV(KIND, T, NAME)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) sd_##KIND##_##NAME(const T *x, const T *filter, const T *bias,      \
                                                                        const T *residual, T *y, ConvShape shape) {      \
        KIND<T>(x, filter, bias, residual, y, shape);                                                                     \
    }
CONV(conv2d, float, f32)
CONV(conv2d, half_t, f16)
CONV(conv2d, bfloat_t, bf16)
CONV(conv2d_tiles, half_t, f16)
CONV(conv2d_tiles, bfloat_t, bf16)
