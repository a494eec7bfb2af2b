// cuBLAS, cuDNN and cuRAND, as far as candle calls them: matrix products and convolutions with sums in float32, or, where
// cuDNN is told to compute in float16, as the tensor cores do that: 16 products at a time onto a float16 sum.
#include "sim.h"
#include "device.h"
#include <vector>

namespace {
enum Type { F32, F16, BF16 };
using Vector = float __attribute__((vector_size(32), aligned(4)));

size_t width(Type type) { return type == F32 ? 4 : 2; }
float load(Type type, const void *p, size_t i) {
    if (type == F32) return ((const float *)p)[i];
    return type == F16 ? (float)((const __half *)p)[i] : (float)((const __nv_bfloat16 *)p)[i];
}
void store(Type type, void *p, size_t i, float x) {
    if (type == F32) ((float *)p)[i] = x;
    else if (type == F16) ((__half *)p)[i] = x;
    else ((__nv_bfloat16 *)p)[i] = x;
}
float to_tf32(float x) { // 10 bits of mantissa, ties away from zero
    unsigned u = __float_as_uint(x);
    return (u & 0x7f800000) == 0x7f800000 ? x : __uint_as_float((u + 0x1000) & ~0x1fffu);
}

template <int ROWS> void tile(int n, int k, const float *a, int lda, const float *b, float *c, int columns) {
    Vector sum[ROWS][2] = {};
    for (int l = 0; l < k; l++) {
        Vector b0 = *(const Vector *)(b + (size_t)l * 16), b1 = *(const Vector *)(b + (size_t)l * 16 + 8);
        for (int r = 0; r < ROWS; r++) {
            float x = a[(size_t)r * lda + l];
            sum[r][0] += x * b0;
            sum[r][1] += x * b1;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < columns; j++) c[(size_t)r * n + j] = ((float *)sum[r])[j];
}
}

void sim_gemm(int m, int n, int k, const float *a, const float *b, float *c) {
    static thread_local std::vector<float> packed;
    packed.assign((size_t)k * 16, 0);
    for (int j = 0; j < n; j += 16) {
        int columns = std::min(16, n - j), i = 0;
        for (int l = 0; l < k; l++) memcpy(&packed[(size_t)l * 16], b + (size_t)l * n + j, columns * 4);
        for (; i + 6 <= m; i += 6) tile<6>(n, k, a + (size_t)i * k, k, packed.data(), c + (size_t)i * n + j, columns);
        for (; i < m; i++) tile<1>(n, k, a + (size_t)i * k, k, packed.data(), c + (size_t)i * n + j, columns);
    }
}

// Sums in float16, rounded after every 16 products.
static void half_gemm(int m, int n, int k, const float *a, const float *b, float *c) {
    std::vector<float> sum(n), part(n);
    for (int i = 0; i < m; i++) {
        std::fill(sum.begin(), sum.end(), 0);
        for (int first = 0; first < k; first += 16) {
            std::copy(sum.begin(), sum.end(), part.begin());
            for (int l = first; l < std::min(k, first + 16); l++)
                for (int j = 0; j < n; j++) part[j] += a[(size_t)i * k + l] * b[(size_t)l * n + j];
            for (int j = 0; j < n; j++) sum[j] = (float)__half(part[j]);
        }
        std::copy(sum.begin(), sum.end(), c + (size_t)i * n);
    }
}

// What cublasCreate and cudnnCreate hand out.
struct Library { void *stream = nullptr; };

extern "C" {
#pragma GCC visibility push(default)
using Handle = void *;
static void *stream_of(Handle library) { return ((Library *)library)->stream; }
static int create(Handle *handle, const char *name) { if (int s = sim_fault(name)) return s; *handle = new Library; return 0; }
static int destroy(Handle handle) { delete (Library *)handle; return 0; }
static int set_stream(Handle handle, Handle stream) { ((Library *)handle)->stream = stream; return 0; }

// ---- cuBLAS
int cublasCreate_v2(Handle *handle) { return create(handle, "cublasCreate"); }
int cublasDestroy_v2(Handle handle) { return destroy(handle); }
int cublasSetStream_v2(Handle handle, Handle stream) { return set_stream(handle, stream); }
int cublasGemmStridedBatchedEx(Handle handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *A, int at, int lda, long long sa,
                               const void *B, int bt, int ldb, long long sb, const void *beta, void *C, int ct, int ldc, long long sc, int batch, int compute, int) {
    auto type_of = [](int t) { if (t != 0 && t != 2 && t != 14) sim_fail("cuBLAS: data type %d", t); return t == 0 ? F32 : t == 2 ? F16 : BF16; };
    Type ta_ = type_of(at), tb_ = type_of(bt), tc = type_of(ct);
    if (compute != 68 && compute != 77 && compute != 75) sim_fail("cuBLAS: compute type %d", compute);
    if (lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) || ldc < std::max(1, m)) return 7; // CUBLAS_STATUS_INVALID_VALUE
    auto extent = [batch](int rows, int columns, int ld, long long stride, Type t) {
        return (rows && columns) ? ((size_t)(batch - 1) * stride + (size_t)(columns - 1) * ld + rows) * width(t) : 0;
    };
    float al = *(const float *)alpha, be = *(const float *)beta;
    bool tf32 = compute == 77;
    SimOnStream on(stream_of(handle));
    return sim_enqueue("cublasGemmStridedBatchedEx", 2ull * m * n * k * batch, [=] {
        sim_touch("cublasGemmStridedBatchedEx A", 7, A, extent(ta ? k : m, ta ? m : k, lda, sa, ta_));
        sim_touch("cublasGemmStridedBatchedEx B", 11, B, extent(tb ? n : k, tb ? k : n, ldb, sb, tb_));
        sim_touch("cublasGemmStridedBatchedEx C", 15, C, extent(m, n, ldc, sc, tc));
        if (sim_flag("SIM_SKIP")) return;
        SimTimer timer(SIM_GEMM);
        // Column-major C (m, n) = A B is row-major C' (n, m) = B' A'.
        std::vector<float> a((size_t)k * m), b((size_t)n * k), c((size_t)n * m);
        for (int i = 0; i < batch; i++) {
            const char *pa = (const char *)A + (size_t)i * sa * width(ta_), *pb = (const char *)B + (size_t)i * sb * width(tb_);
            char *pc = (char *)C + (size_t)i * sc * width(tc);
            if (i == 0 || sa)
                for (int l = 0; l < k; l++)
                    for (int j = 0; j < m; j++) a[(size_t)l * m + j] = load(ta_, pa, ta ? (size_t)j * lda + l : (size_t)l * lda + j);
            if (i == 0 || sb)
                for (int j = 0; j < n; j++)
                    for (int l = 0; l < k; l++) b[(size_t)j * k + l] = load(tb_, pb, tb ? (size_t)l * ldb + j : (size_t)j * ldb + l);
            if (tf32) { for (float &x : a) x = to_tf32(x); for (float &x : b) x = to_tf32(x); }
            sim_gemm(n, m, k, b.data(), a.data(), c.data());
            for (int j = 0; j < n; j++)
                for (int l = 0; l < m; l++) {
                    size_t at = (size_t)j * ldc + l;
                    store(tc, pc, at, al * c[(size_t)j * m + l] + (be == 0 ? 0 : be * load(tc, pc, at)));
                }
        }
        sim_check_finite("cublasGemmStridedBatchedEx", "fhb"[tc], C, extent(m, n, ldc, sc, tc));
    });
}

// ---- cuRAND: made at the start by candle, never drawn from
int curandCreateGenerator(Handle *g, int) { *g = (Handle)1; return 0; }
int curandDestroyGenerator(Handle) { return 0; }
int curandSetStream(Handle, Handle) { return 0; }
int curandSetPseudoRandomGeneratorSeed(Handle, unsigned long long) { return 0; }

// ---- cuDNN
struct TensorDescriptor { Type type; int dims[4], strides[4]; };
struct ConvDescriptor { int pad[2], stride[2], dilation[2], mode, compute; };
static Type dnn_type(int t) { if (t != 0 && t != 2 && t != 9) sim_fail("cuDNN: data type %d", t); return t == 0 ? F32 : t == 2 ? F16 : BF16; }
int cudnnCreate(Handle *handle) { return create(handle, "cudnnCreate"); }
int cudnnDestroy(Handle handle) { return destroy(handle); }
int cudnnSetStream(Handle handle, Handle stream) { return set_stream(handle, stream); }
int cudnnCreateTensorDescriptor(Handle *d) { *d = new TensorDescriptor(); return 0; }
int cudnnDestroyTensorDescriptor(Handle d) { delete (TensorDescriptor *)d; return 0; }
int cudnnSetTensor4dDescriptor(Handle d, int format, int type, int n, int c, int h, int w) {
    if (format != 0) sim_fail("cuDNN: tensor format %d", format);
    *(TensorDescriptor *)d = {dnn_type(type), {n, c, h, w}, {c * h * w, h * w, w, 1}};
    return 0;
}
int cudnnSetTensor4dDescriptorEx(Handle d, int type, int n, int c, int h, int w, int sn, int sc, int sh, int sw) {
    *(TensorDescriptor *)d = {dnn_type(type), {n, c, h, w}, {sn, sc, sh, sw}};
    return 0;
}
int cudnnCreateFilterDescriptor(Handle *d) { return cudnnCreateTensorDescriptor(d); }
int cudnnDestroyFilterDescriptor(Handle d) { return cudnnDestroyTensorDescriptor(d); }
int cudnnSetFilter4dDescriptor(Handle d, int type, int format, int k, int c, int h, int w) { return cudnnSetTensor4dDescriptor(d, format, type, k, c, h, w); }
int cudnnCreateConvolutionDescriptor(Handle *d) { *d = new ConvDescriptor(); return 0; }
int cudnnDestroyConvolutionDescriptor(Handle d) { delete (ConvDescriptor *)d; return 0; }
int cudnnSetConvolution2dDescriptor(Handle d, int ph, int pw, int sh, int sw, int dh, int dw, int mode, int compute) {
    *(ConvDescriptor *)d = {{ph, pw}, {sh, sw}, {dh, dw}, mode, compute};
    return 0;
}
struct Performance { int algo, status; float time; size_t memory; int determinism, math, reserved[3]; };
int cudnnGetConvolutionForwardAlgorithm_v7(Handle, Handle, Handle, Handle, Handle, int, int *count, Performance *p) {
    *count = 1;
    p[0] = {1, 0, 0, 0, 1, 0, {}};
    return 0;
}
static size_t workspace_of(const ConvDescriptor &, const TensorDescriptor &w, const TensorDescriptor &) {
    return (size_t)w.dims[1] * w.dims[2] * w.dims[3] * 16; // the precomputed indices of an implicit product, about
}
int cudnnGetConvolutionForwardWorkspaceSize(Handle, Handle, Handle w, Handle conv, Handle y, int, size_t *bytes) {
    *bytes = workspace_of(*(ConvDescriptor *)conv, *(TensorDescriptor *)w, *(TensorDescriptor *)y);
    return 0;
}
int cudnnConvolutionForward(Handle handle, const void *alpha, Handle xd, const void *x, Handle wd, const void *w, Handle cd, int, void *workspace, size_t workspace_bytes,
                            const void *beta, Handle yd, void *y) {
    const TensorDescriptor X = *(TensorDescriptor *)xd, W = *(TensorDescriptor *)wd, Y = *(TensorDescriptor *)yd;
    const ConvDescriptor D = *(ConvDescriptor *)cd;
    int inputs = W.dims[1], outputs = W.dims[0], kh = W.dims[2], kw = W.dims[3], oh = Y.dims[2], ow = Y.dims[3];
    size_t k = (size_t)inputs * kh * kw, n = (size_t)oh * ow;
    auto expected = [&](int i) { return (X.dims[2 + i] + 2 * D.pad[i] - D.dilation[i] * (W.dims[2 + i] - 1) - 1) / D.stride[i] + 1; };
    if (X.dims[1] != inputs || Y.dims[1] != outputs || X.dims[0] != Y.dims[0] || oh != expected(0) || ow != expected(1)) return 2000; // CUDNN_STATUS_BAD_PARAM
    if (X.type != W.type || X.type != Y.type || D.mode != 1) return 3000; // CUDNN_STATUS_NOT_SUPPORTED
    if (D.compute != 0 && !(D.compute == 2 && X.type == F16)) return 3000;
    if (workspace_bytes < workspace_of(D, W, Y)) return 2000;
    auto extent = [](const TensorDescriptor &t) {
        size_t last = 0;
        for (int i = 0; i < 4; i++) last += (size_t)(t.dims[i] - 1) * t.strides[i];
        return (last + 1) * width(t.type);
    };
    float al = *(const float *)alpha, be = *(const float *)beta;
    SimOnStream on(stream_of(handle));
    return sim_enqueue("cudnnConvolutionForward", 2 * k * n * outputs * X.dims[0], [=] {
        sim_touch("cudnnConvolutionForward x", 3, x, extent(X));
        sim_touch("cudnnConvolutionForward w", 5, w, extent(W));
        sim_touch("cudnnConvolutionForward y", 12, y, extent(Y));
        if (workspace) sim_touch("cudnnConvolutionForward workspace", 8, workspace, workspace_bytes);
        if (sim_flag("SIM_SKIP")) return;
        SimTimer timer(SIM_CONV);
        bool halves = D.compute == 2 && !sim_flag("SIM_HALF_SUMS_IN_F32"), tf32 = X.type == F32 && sim_flag("SIM_TF32");
        std::vector<float> weights(outputs * k), columns(k * n), result(outputs * n);
        for (size_t i = 0; i < weights.size(); i++) weights[i] = load(W.type, w, i);
        if (tf32) for (float &v : weights) v = to_tf32(v);
        for (int b = 0; b < X.dims[0]; b++) {
            for (int c = 0; c < inputs; c++)
                for (int fy = 0; fy < kh; fy++)
                    for (int fx = 0; fx < kw; fx++) {
                        float *row = &columns[(((size_t)c * kh + fy) * kw + fx) * n];
                        for (int py = 0; py < oh; py++)
                            for (int px = 0; px < ow; px++) {
                                int iy = py * D.stride[0] - D.pad[0] + fy * D.dilation[0], ix = px * D.stride[1] - D.pad[1] + fx * D.dilation[1];
                                bool inside = iy >= 0 && iy < X.dims[2] && ix >= 0 && ix < X.dims[3];
                                float v = inside ? load(X.type, x, (size_t)b * X.strides[0] + (size_t)c * X.strides[1] + (size_t)iy * X.strides[2] + (size_t)ix * X.strides[3]) : 0;
                                row[(size_t)py * ow + px] = tf32 ? to_tf32(v) : v;
                            }
                    }
            (halves ? half_gemm : sim_gemm)(outputs, n, k, weights.data(), columns.data(), result.data());
            for (int o = 0; o < outputs; o++)
                for (int py = 0; py < oh; py++)
                    for (int px = 0; px < ow; px++) {
                        size_t at = (size_t)b * Y.strides[0] + (size_t)o * Y.strides[1] + (size_t)py * Y.strides[2] + (size_t)px * Y.strides[3];
                        store(Y.type, y, at, al * result[o * n + (size_t)py * ow + px] + (be == 0 ? 0 : be * load(Y.type, y, at)));
                    }
        }
        sim_check_finite("cudnnConvolutionForward", "fhb"[Y.type], y, extent(Y));
    });
}
#pragma GCC visibility pop
}
