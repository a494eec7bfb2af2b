// Attention whose scores are never whole in memory: softmax is done on the way (Milakov and Gimelshein, 2018). Scores, sums
// and exponentials are float32 whatever the type.
#include "sd_mma.cuh"

struct AttentionShape {
    int queries, keys;
    int size;                                  // of a head
    int heads;
    int q_row, k_row, v_row;                   // from a position to the next, in values
    long long q_batch, k_batch, v_batch;       // from an element of the batch to the next
    float scale;                               // of the scores
    int causal;                                // whether a position sees itself and those before it alone
};

// Plain: q (b, queries, heads * size), k and v (b, keys, heads * size) by the shape's strides -> y (b, queries, heads * size).
// Grid (queries / 32 rounded up, heads, b), 256 threads: 32 queries, 8 threads each. size is at most D, a multiple of 64.
template <class T, int D>
__device__ void attention_plain(const T *q, const T *k, const T *v, T *y, AttentionShape shape) {
    constexpr int CHUNK = 64, TILE = 32;
    __shared__ float qs[TILE][CHUNK + 1], ks[TILE][CHUNK + 1], weights[TILE][TILE + 1];
    const int thread = threadIdx.x, line = thread / 8, part = thread % 8;
    const int first = blockIdx.x * TILE, query = first + line;
    q += blockIdx.z * shape.q_batch + blockIdx.y * shape.size;
    k += blockIdx.z * shape.k_batch + blockIdx.y * shape.size;
    v += blockIdx.z * shape.v_batch + blockIdx.y * shape.size;

    // A tile of `CHUNK` of the head's values, zeros beyond its ends.
    auto fetch = [&](float (*to)[CHUNK + 1], const T *from, int row, int start, int rows, int chunk) {
        for (int i = thread; i < TILE * CHUNK; i += 256) {
            const int r = start + i / CHUNK, c = chunk + i % CHUNK;
            to[i / CHUNK][i % CHUNK] = r < rows && c < shape.size ? to_float(from[(size_t)r * row + c]) : 0.0f;
        }
    };

    float sums[D / 8] = {}, most = -INFINITY, total = 0;
    const int keys = shape.causal ? min(shape.keys, first + TILE) : shape.keys;
    for (int start = 0; start < keys; start += TILE) {
        float scores[4] = {};
        for (int chunk = 0; chunk < D; chunk += CHUNK) {
            __syncthreads();
            if (D > CHUNK || start == 0) fetch(qs, q, shape.q_row, first, shape.queries, chunk);
            fetch(ks, k, shape.k_row, start, shape.keys, chunk);
            __syncthreads();
#pragma unroll 4
            for (int c = 0; c < CHUNK; c++)
                for (int i = 0; i < 4; i++) scores[i] += qs[line][c] * ks[part + 8 * i][c];
        }
        float tile_most = -INFINITY;
        for (int i = 0; i < 4; i++) {
            const int key = start + part + 8 * i;
            const bool seen = key < shape.keys && (!shape.causal || key <= query);
            scores[i] = seen ? scores[i] * shape.scale : -INFINITY;
            tile_most = fmaxf(tile_most, scores[i]);
        }
        for (int by = 4; by > 0; by /= 2) tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, by));
        // The first tile has a key that every query sees, so that this is finite.
        const float now_most = fmaxf(most, tile_most), shrink = expf(most - now_most);
        float tile_total = 0;
        for (int i = 0; i < 4; i++) {
            const float weight = expf(scores[i] - now_most);
            weights[line][part + 8 * i] = weight;
            tile_total += weight;
        }
        for (int by = 4; by > 0; by /= 2) tile_total += __shfl_xor_sync(0xffffffffu, tile_total, by);
        total = total * shrink + tile_total;
        most = now_most;
#pragma unroll
        for (int i = 0; i < D / 8; i++) sums[i] *= shrink;
#pragma unroll
        for (int chunk = 0; chunk < D; chunk += CHUNK) {
            __syncthreads();
            fetch(ks, v, shape.v_row, start, shape.keys, chunk);
            __syncthreads();
#pragma unroll 2
            for (int key = 0; key < TILE; key++) {
                const float weight = weights[line][key];
#pragma unroll
                for (int i = 0; i < CHUNK / 8; i++) sums[chunk / 8 + i] += weight * ks[key][part + 8 * i];
            }
        }
    }
    if (query >= shape.queries) return;
    y += (((size_t)blockIdx.z * shape.queries + query) * shape.heads + blockIdx.y) * shape.size;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
        const int c = i / (CHUNK / 8) * CHUNK + i % (CHUNK / 8) * 8 + part;
        if (c < shape.size) y[c] = from_float<T>(sums[i] / total);
    }
}

// On tensor cores, for heads of at most D, a multiple of 16: as attention_plain, the size, strides and pointers multiples of 8 values.
// Grid (queries / 64 rounded up, heads, b), 128 threads: a warp has 16 queries, whose 64 scores a tile stay in its registers.
template <class T, int D> __device__ void attention_tiles(const T *q, const T *k, const T *v, T *y, AttentionShape shape) {
    constexpr int TILE = 64, ROW = D + 8; // 8 more, so that the rows of a fragment lie in different banks
    __shared__ __align__(16) T ks[TILE * ROW];
    __shared__ __align__(16) T vs[TILE * ROW];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * 64;
    q += blockIdx.z * shape.q_batch + blockIdx.y * shape.size;
    k += blockIdx.z * shape.k_batch + blockIdx.y * shape.size;
    v += blockIdx.z * shape.v_batch + blockIdx.y * shape.size;

    // Zeros beyond the last row: their scores are masked, and 0 * 0 adds nothing where memory might hold no number. Zeros beyond a
    // head's last value, which add nothing to scores and are not written.
    auto fetch = [&](T *to, const T *from, int row, int start, int rows) {
        for (int i = thread; i < TILE * (D / 8); i += 128) {
            const int r = i / (D / 8), c = i % (D / 8) * 8;
            Vector<T, 8> values;
            for (int j = 0; j < 8; j++) values.at[j] = from_float<T>(0.0f);
            if (start + r < rows && c < shape.size) values = load<T, 8>(from + (size_t)(start + r) * row + c);
            store<T, 8>(to + r * ROW + c, values);
        }
    };
    // Rows l % 16 of a 16 x 16 tile, its right half for the lanes from 16 on: the order of load_tiles for a fragment a.
    const int tile_row = lane % 16, tile_column = lane / 16 * 8;

    fetch(ks, q, shape.q_row, first, shape.queries);
    __syncthreads();
    unsigned queries[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++)
        load_tiles(queries[step], ks + (warp * 16 + tile_row) * ROW + step * 16 + tile_column);

    float sums[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const int keys = shape.causal ? min(shape.keys, first + 64) : shape.keys;
    for (int start = 0; start < keys; start += TILE) {
        __syncthreads();
        fetch(ks, k, shape.k_row, start, shape.keys);
        fetch(vs, v, shape.v_row, start, shape.keys);
        __syncthreads();
        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++)
#pragma unroll
            for (int tile = 0; tile < TILE / 8; tile += 2) {
                // Keys are rows here, as the columns of b are: four tiles are two fragments.
                unsigned b[4];
                load_tiles(b, ks + (tile * 8 + lane / 16 * 8 + lane % 8) * ROW + step * 16 + lane / 8 % 2 * 8);
                multiply<T>(scores[tile], queries[step], b);
                multiply<T>(scores[tile + 1], queries[step], b + 2);
            }
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + warp * 16 + g + 8 * half;
            float tile_most = most[half];
#pragma unroll
            for (int tile = 0; tile < TILE / 8; tile++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int key = start + tile * 8 + 2 * t + i;
                    float &score = scores[tile][2 * half + i];
                    const bool seen = key < shape.keys && (!shape.causal || key <= query);
                    score = seen ? score * shape.scale : -INFINITY;
                    tile_most = fmaxf(tile_most, score);
                }
            for (int by = 2; by > 0; by /= 2) tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, by));
            shrink[half] = expf(most[half] - tile_most);
            most[half] = tile_most;
            total[half] *= shrink[half];
#pragma unroll
            for (int tile = 0; tile < TILE / 8; tile++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &score = scores[tile][2 * half + i];
                    score = expf(score - tile_most);
                    total[half] += score; // of this lane's keys; the lanes' are joined at the end
                }
        }
#pragma unroll
        for (int tile = 0; tile < D / 8; tile++)
            for (int i = 0; i < 4; i++) sums[tile][i] *= shrink[i / 2];
#pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
            // The fragment of scores is that of weights: column 2t of two neighbouring tiles.
            const float *left = scores[2 * step], *right = scores[2 * step + 1];
            const unsigned a[4] = {pair_of<T>(left[0], left[1]), pair_of<T>(left[2], left[3]),
                                   pair_of<T>(right[0], right[1]), pair_of<T>(right[2], right[3])};
#pragma unroll
            for (int tile = 0; tile < D / 8; tile += 2) {
                unsigned b[4];
                load_transposed(b, vs + (step * 16 + tile_row) * ROW + tile * 8 + tile_column);
                multiply<T>(sums[tile], a, b);
                multiply<T>(sums[tile + 1], a, b + 2);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int by = 2; by > 0; by /= 2) total[half] += __shfl_xor_sync(0xffffffffu, total[half], by);
        const int query = first + warp * 16 + g + 8 * half;
        if (query < shape.queries) {
            T *to = y + (((size_t)blockIdx.z * shape.queries + query) * shape.heads + blockIdx.y) * shape.size + 2 * t;
#pragma unroll
            for (int tile = 0; tile < D / 8; tile++)
                if (tile * 8 < shape.size)
                    *reinterpret_cast<unsigned *>(to + tile * 8) =
                        pair_of<T>(sums[tile][2 * half] / total[half], sums[tile][2 * half + 1] / total[half]);
        }
    }
}

// On tensor cores, for one wide head of 512 (the VAE's): as attention_tiles. Grid (queries / 32 rounded up, heads, b), 256 threads:
// 32 queries; of the 8 warps, two rows of 16 queries by four columns, of 8 keys each for the scores and of 32 of every 128
// values for the sums. Keys and values come 128 of their 512 at a time.
template <class T> __device__ void attention_512(const T *q, const T *k, const T *v, T *y, AttentionShape shape) {
    constexpr int D = 512, TILE = 32, CHUNK = 128, Q_ROW = D + 8, ROW = CHUNK + 8, W_ROW = TILE + 8;
    __shared__ __align__(16) T qs[32 * Q_ROW];
    __shared__ __align__(16) T ks[TILE * ROW];
    __shared__ __align__(16) T weights[32 * W_ROW];
    __shared__ float tile_most[4][32], tile_total[4][32];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int rows = warp / 4 * 16, column = warp % 4, first = blockIdx.x * 32;
    q += blockIdx.z * shape.q_batch + blockIdx.y * D;
    k += blockIdx.z * shape.k_batch + blockIdx.y * D;
    v += blockIdx.z * shape.v_batch + blockIdx.y * D;

    auto fetch = [&](T *to, int to_row, const T *from, int row, int start, int last, int width) {
        for (int i = thread; i < TILE * width / 8; i += 256) {
            const int r = i / (width / 8), c = i % (width / 8) * 8;
            Vector<T, 8> values;
            for (int j = 0; j < 8; j++) values.at[j] = from_float<T>(0.0f);
            if (start + r < last) values = load<T, 8>(from + (size_t)(start + r) * row + c);
            store<T, 8>(to + r * to_row + c, values);
        }
    };
    const int tile_row = lane % 16, tile_column = lane / 16 * 8;

    fetch(qs, Q_ROW, q, shape.q_row, first, shape.queries, D);
    float sums[D / 32][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const int keys = shape.causal ? min(shape.keys, first + 32) : shape.keys;
    for (int start = 0; start < keys; start += TILE) {
        float scores[4] = {};
        for (int chunk = 0; chunk < D; chunk += CHUNK) {
            __syncthreads();
            fetch(ks, ROW, k + chunk, shape.k_row, start, shape.keys, CHUNK);
            __syncthreads();
#pragma unroll
            for (int step = 0; step < CHUNK / 16; step += 2) {
                unsigned a[4], b[4];
                load_tiles(b, ks + (column * 8 + lane % 8) * ROW + step * 16 + lane / 8 * 8);
                load_tiles(a, qs + (rows + tile_row) * Q_ROW + chunk + step * 16 + tile_column);
                multiply<T>(scores, a, b);
                load_tiles(a, qs + (rows + tile_row) * Q_ROW + chunk + step * 16 + 16 + tile_column);
                multiply<T>(scores, a, b + 2);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = rows + g + 8 * half;
            float here = -INFINITY;
            for (int i = 0; i < 2; i++) {
                const int key = start + column * 8 + 2 * t + i;
                float &score = scores[2 * half + i];
                const bool seen = key < shape.keys && (!shape.causal || key <= first + line);
                score = seen ? score * shape.scale : -INFINITY;
                here = fmaxf(here, score);
            }
            for (int by = 2; by > 0; by /= 2) here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, by));
            if (t == 0) tile_most[column][line] = here;
        }
        __syncthreads();
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = rows + g + 8 * half;
            float now = most[half];
            for (int i = 0; i < 4; i++) now = fmaxf(now, tile_most[i][line]);
            shrink[half] = expf(most[half] - now);
            most[half] = now;
            const float low = expf(scores[2 * half] - now), high = expf(scores[2 * half + 1] - now);
            *reinterpret_cast<unsigned *>(weights + line * W_ROW + column * 8 + 2 * t) = pair_of<T>(low, high);
            float here = low + high;
            for (int by = 2; by > 0; by /= 2) here += __shfl_xor_sync(0xffffffffu, here, by);
            if (t == 0) tile_total[column][line] = here;
        }
#pragma unroll
        for (int tile = 0; tile < D / 32; tile++)
            for (int i = 0; i < 4; i++) sums[tile][i] *= shrink[i / 2];
#pragma unroll
        for (int chunk = 0; chunk < D; chunk += CHUNK) {
            __syncthreads();
            fetch(ks, ROW, v + chunk, shape.v_row, start, shape.keys, CHUNK);
            __syncthreads();
            if (chunk == 0)
                for (int half = 0; half < 2; half++) {
                    const int line = rows + g + 8 * half;
                    total[half] = total[half] * shrink[half] + tile_total[0][line] + tile_total[1][line] +
                                  tile_total[2][line] + tile_total[3][line];
                }
#pragma unroll
            for (int step = 0; step < TILE / 16; step++) {
                unsigned a[4];
                load_tiles(a, weights + (rows + tile_row) * W_ROW + step * 16 + tile_column);
#pragma unroll
                for (int tile = 0; tile < 4; tile += 2) {
                    unsigned b[4];
                    load_transposed(b, ks + (step * 16 + tile_row) * ROW + column * 32 + tile * 8 + tile_column);
                    multiply<T>(sums[chunk / 32 + tile], a, b);
                    multiply<T>(sums[chunk / 32 + tile + 1], a, b + 2);
                }
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = first + rows + g + 8 * half;
        if (query < shape.queries) {
            T *to = y + (((size_t)blockIdx.z * shape.queries + query) * shape.heads + blockIdx.y) * D;
#pragma unroll
            for (int tile = 0; tile < D / 32; tile++)
                *reinterpret_cast<unsigned *>(to + tile / 4 * CHUNK + column * 32 + tile % 4 * 8 + 2 * t) =
                    pair_of<T>(sums[tile][2 * half] / total[half], sums[tile][2 * half + 1] / total[half]);
        }
    }
}

#define PLAIN(T, NAME, D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) sd_attention_plain_##NAME##_##D(                                    \
        const T *q, const T *k, const T *v, T *y, AttentionShape shape) {                                                 \
        attention_plain<T, D>(q, k, v, y, shape);                                                                         \
    }
#define TILES(T, NAME, D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128) sd_attention_tiles_##NAME##_##D(                                    \
        const T *q, const T *k, const T *v, T *y, AttentionShape shape) {                                                 \
        attention_tiles<T, D>(q, k, v, y, shape);                                                                         \
    }
#define TENSOR_CORES(T, NAME)                                                                                             \
    TILES(T, NAME, 48) TILES(T, NAME, 64) TILES(T, NAME, 80) TILES(T, NAME, 160)                                          \
    extern "C" __global__ void __launch_bounds__(256) sd_attention_tiles_##NAME##_512(                                    \
        const T *q, const T *k, const T *v, T *y, AttentionShape shape) {                                                 \
        attention_512<T>(q, k, v, y, shape);                                                                              \
    }
#define SIZES(T, NAME) PLAIN(T, NAME, 64) PLAIN(T, NAME, 128) PLAIN(T, NAME, 256) PLAIN(T, NAME, 512)

SIZES(float, f32)
SIZES(half_t, f16)
SIZES(bfloat_t, bf16)
TENSOR_CORES(half_t, f16)
TENSOR_CORES(bfloat_t, bf16)
