// cuBLAS, cuBLASLt, cuDNN and cuRAND, as far as candle and this program call them: matrix products and convolutions with sums in float32, or, where
// cuDNN is told to compute in float16, as the tensor cores do that: 16 products at a time onto a float16 sum.
#include "sim.h"
#include "device.h"
#include <string>
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

// ---- cuBLASLt: products with bias and a third matrix, as far as src/kernels/cuda/gemm.rs calls it
struct LtLayout { Type type; uint64_t rows, columns; int64_t ld; };
struct LtProduct { int compute, transposed[2] = {0, 0}, epilogue = 1; const void *bias = nullptr; int bias_type = -1; };
struct LtPreference { size_t workspace = 0; uint32_t alignment[4] = {256, 256, 256, 256}; };
struct LtAlgorithm { uint64_t problem; uint32_t alignment[4]; uint64_t workspace, unused[4]; }; // of cublasLtMatmulAlgo_t's 64 bytes
struct LtHeuristic { LtAlgorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
static_assert(sizeof(LtAlgorithm) == 64);
static bool lt_type(int type, Type *to) {
    *to = type == 2 ? F16 : type == 14 ? BF16 : F32;
    return type == 0 || type == 2 || type == 14;
}
int cublasLtCreate(Handle *handle) { return create(handle, "cublasLtCreate"); }
int cublasLtDestroy(Handle handle) { return destroy(handle); }
int cublasLtMatrixLayoutCreate(Handle *layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    Type t;
    if (!lt_type(type, &t)) sim_fail("cublasLtMatrixLayoutCreate: data type %d", type);
    *layout = new LtLayout{t, rows, columns, ld};
    return 0;
}
int cublasLtMatrixLayoutDestroy(Handle layout) { delete (LtLayout *)layout; return 0; }
int cublasLtMatmulDescCreate(Handle *product, int compute, int scale) {
    if ((compute != 68 && compute != 77) || scale != 0) sim_fail("cublasLtMatmulDescCreate: compute type %d, scale type %d", compute, scale);
    *product = new LtProduct{compute};
    return 0;
}
int cublasLtMatmulDescDestroy(Handle product) { delete (LtProduct *)product; return 0; }
int cublasLtMatmulDescSetAttribute(Handle handle, int attribute, const void *value, size_t bytes) {
    LtProduct &product = *(LtProduct *)handle;
    if (bytes != (attribute == 8 ? 8u : 4u)) return 7; // CUBLAS_STATUS_INVALID_VALUE
    int number = *(const int *)value;
    switch (attribute) {
        case 3: case 4: product.transposed[attribute - 3] = number; break;
        case 7: product.epilogue = number; break;
        case 8: product.bias = *(void *const *)value; break;
        case 26: product.bias_type = number; break;
        default: sim_fail("cublasLtMatmulDescSetAttribute: attribute %d", attribute);
    }
    if (product.epilogue != 1 && product.epilogue != 4) sim_fail("cuBLASLt: epilogue %d", product.epilogue);
    return 0;
}
int cublasLtMatmulPreferenceCreate(Handle *preference) { *preference = new LtPreference; return 0; }
int cublasLtMatmulPreferenceDestroy(Handle preference) { delete (LtPreference *)preference; return 0; }
int cublasLtMatmulPreferenceSetAttribute(Handle handle, int attribute, const void *value, size_t bytes) {
    LtPreference &preference = *(LtPreference *)handle;
    if (bytes != (attribute == 1 ? 8u : 4u)) return 7;
    if (attribute == 1) preference.workspace = *(const size_t *)value;
    else if (attribute >= 5 && attribute <= 8) preference.alignment[attribute - 5] = *(const uint32_t *)value;
    else sim_fail("cublasLtMatmulPreferenceSetAttribute: attribute %d", attribute);
    return 0;
}
// What an algorithm was chosen for; 0 where the sizes do not go together.
static uint64_t lt_problem(const LtProduct &p, const LtLayout &a, const LtLayout &b, const LtLayout &c, const LtLayout &d) {
    uint64_t m = p.transposed[0] ? a.columns : a.rows, k = p.transposed[0] ? a.rows : a.columns;
    uint64_t n = p.transposed[1] ? b.rows : b.columns;
    bool fits = (p.transposed[1] ? b.columns : b.rows) == k && c.rows == m && d.rows == m && c.columns == n && d.columns == n;
    for (const LtLayout *l : {&a, &b, &c, &d}) fits &= l->ld >= (int64_t)l->rows && l->rows && l->columns;
    if (!fits) return 0;
    uint64_t hash = 14695981039346656037ull;
    for (uint64_t part : {m, n, k, (uint64_t)a.type, (uint64_t)d.type, (uint64_t)p.epilogue, (uint64_t)p.compute, (uint64_t)a.ld, (uint64_t)b.ld, (uint64_t)d.ld})
        hash = (hash ^ part) * 1099511628211ull;
    return hash | 1;
}
// The rows of cuBLAS's table that are simulated: equal types, or halves with a float32 result, whose bias is float32 too.
static bool lt_supported(const LtProduct &p, const LtLayout &a, const LtLayout &b, const LtLayout &c, const LtLayout &d) {
    static const int numbers[] = {0, 2, 14};
    if (a.type != b.type || c.type != d.type || (d.type != a.type && d.type != F32)) return false;
    if (p.compute == 77 && a.type != F32) return false;
    return p.epilogue == 1 || p.bias_type == -1 || p.bias_type == numbers[d.type];
}
int cublasLtMatmulAlgoGetHeuristic(Handle, Handle product, Handle a, Handle b, Handle c, Handle d, Handle wish, int, LtHeuristic *results, int *found) {
    const LtProduct &p = *(LtProduct *)product;
    const LtLayout &A = *(LtLayout *)a, &B = *(LtLayout *)b, &C = *(LtLayout *)c, &D = *(LtLayout *)d;
    sim_count("choice of an algorithm by cuBLASLt", 0);
    if (int s = sim_fault("cublasLtMatmulAlgoGetHeuristic")) return s;
    *found = 0;
    uint64_t problem = lt_problem(p, A, B, C, D);
    if (!problem) return 7;
    if (!lt_supported(p, A, B, C, D)) return 15; // CUBLAS_STATUS_NOT_SUPPORTED
    const LtPreference &preference = *(LtPreference *)wish;
    uint64_t depth = p.transposed[0] ? A.rows : A.columns;
    size_t workspace = depth >= 2048 ? std::min<size_t>(preference.workspace, 4 << 20) : 0; // as where the depth is split
    LtHeuristic &result = *results;
    result = {};
    result.algorithm.problem = problem;
    memcpy(result.algorithm.alignment, preference.alignment, sizeof preference.alignment);
    result.algorithm.workspace = result.workspace = workspace;
    *found = 1;
    return 0;
}
int cublasLtMatmul(Handle, Handle product, const void *alpha, const void *a, Handle al, const void *b, Handle bl, const void *beta, const void *c, Handle cl,
                   void *d, Handle dl, const LtAlgorithm *algorithm, void *workspace, size_t workspace_bytes, Handle stream) {
    const LtProduct p = *(LtProduct *)product;
    const LtLayout A = *(LtLayout *)al, B = *(LtLayout *)bl, C = *(LtLayout *)cl, D = *(LtLayout *)dl;
    uint64_t problem = lt_problem(p, A, B, C, D);
    if (!problem || (p.epilogue == 4 && !p.bias)) return 7;
    if (!lt_supported(p, A, B, C, D)) return 15;
    if (algorithm) {
        if (algorithm->problem != problem) sim_fail("cublasLtMatmul: the algorithm was chosen for another product");
        if (workspace_bytes < algorithm->workspace) return 7;
        const void *places[] = {a, b, c, d};
        for (int i = 0; i < 4; i++)
            if ((uintptr_t)places[i] % algorithm->alignment[i]) sim_fail("cublasLtMatmul: matrix %c lies at no multiple of the %u bytes that its algorithm was chosen for", "ABCD"[i], algorithm->alignment[i]);
    }
    auto extent = [](const LtLayout &l) { return ((size_t)(l.columns - 1) * l.ld + l.rows) * width(l.type); };
    int m = D.rows, n = D.columns, k = p.transposed[0] ? A.rows : A.columns;
    float x = *(const float *)alpha, y = *(const float *)beta;
    if (y == 0 && c != d) c = d;
    SimOnStream on(stream);
    return sim_enqueue("cublasLtMatmul", 2ull * m * n * k, [=] {
        sim_touch("cublasLtMatmul A", 3, a, extent(A));
        sim_touch("cublasLtMatmul B", 5, b, extent(B));
        if (y != 0) sim_touch("cublasLtMatmul C", 8, c, extent(C));
        sim_touch("cublasLtMatmul D", 10, d, extent(D));
        if (p.epilogue == 4) sim_touch("cublasLtMatmul bias", 1, p.bias, (size_t)m * width(D.type));
        if (workspace_bytes) sim_touch("cublasLtMatmul workspace", 13, workspace, workspace_bytes);
        if (sim_flag("SIM_SKIP")) return;
        SimTimer timer(SIM_GEMM);
        // Column-major D (m, n) = A B is row-major D' (n, m) = B' A'.
        std::vector<float> left((size_t)k * m), right((size_t)n * k), sums((size_t)n * m);
        for (int l = 0; l < k; l++)
            for (int j = 0; j < m; j++) left[(size_t)l * m + j] = load(A.type, a, p.transposed[0] ? (size_t)j * A.ld + l : (size_t)l * A.ld + j);
        for (int j = 0; j < n; j++)
            for (int l = 0; l < k; l++) right[(size_t)j * k + l] = load(B.type, b, p.transposed[1] ? (size_t)l * B.ld + j : (size_t)j * B.ld + l);
        if (p.compute == 77) { for (float &v : left) v = to_tf32(v); for (float &v : right) v = to_tf32(v); }
        sim_gemm(n, m, k, right.data(), left.data(), sums.data());
        for (int j = 0; j < n; j++)
            for (int l = 0; l < m; l++) {
                float bias = p.epilogue == 4 ? load(D.type, p.bias, l) : 0, more = y == 0 ? 0 : y * load(C.type, c, (size_t)j * C.ld + l);
                store(D.type, d, (size_t)j * D.ld + l, x * sums[(size_t)j * m + l] + more + bias);
            }
        sim_check_finite("cublasLtMatmul", "fhb"[D.type], d, extent(D));
    });
}

// ---- cuRAND: made at the start by candle, never drawn from
int curandCreateGenerator(Handle *g, int) { *g = (Handle)1; return 0; }
int curandDestroyGenerator(Handle) { return 0; }
int curandSetStream(Handle, Handle) { return 0; }
int curandSetPseudoRandomGeneratorSeed(Handle, unsigned long long) { return 0; }

// ---- cuDNN
struct TensorDescriptor { Type type; int dims[4], strides[4]; };
struct ConvDescriptor { int pad[2], stride[2], dilation[2], mode, compute, math; };
static Type dnn_type(int t) { if (t != 0 && t != 2 && t != 9) sim_fail("cuDNN: data type %d", t); return t == 0 ? F32 : t == 2 ? F16 : BF16; }
int cudnnCreate(Handle *handle) { return create(handle, "cudnnCreate"); }
int cudnnDestroy(Handle handle) { return destroy(handle); }
int cudnnSetStream(Handle handle, Handle stream) { return set_stream(handle, stream); }
int cudnnCreateTensorDescriptor(Handle *d) { *d = new TensorDescriptor(); return 0; }
int cudnnDestroyTensorDescriptor(Handle d) { delete (TensorDescriptor *)d; return 0; }
int cudnnSetTensor4dDescriptor(Handle d, int format, int type, int n, int c, int h, int w) {
    if (format != 0 && format != 1) sim_fail("cuDNN: tensor format %d", format);
    if (format == 0) *(TensorDescriptor *)d = {dnn_type(type), {n, c, h, w}, {c * h * w, h * w, w, 1}};
    else *(TensorDescriptor *)d = {dnn_type(type), {n, c, h, w}, {c * h * w, 1, w * c, c}}; // channels last
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
    *(ConvDescriptor *)d = {{ph, pw}, {sh, sw}, {dh, dw}, mode, compute, 0};
    return 0;
}
int cudnnSetConvolutionMathType(Handle d, int math) { ((ConvDescriptor *)d)->math = math; return 0; }
struct ActivationDescriptor { int mode; };
int cudnnCreateActivationDescriptor(Handle *d) { *d = new ActivationDescriptor{-1}; return 0; }
int cudnnSetActivationDescriptor(Handle d, int mode, int, double) { ((ActivationDescriptor *)d)->mode = mode; return 0; }
int cudnnDestroyActivationDescriptor(Handle d) { delete (ActivationDescriptor *)d; return 0; }
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
static size_t extent_of(const TensorDescriptor &t) {
    size_t last = 0;
    for (int i = 0; i < 4; i++) last += (size_t)(t.dims[i] - 1) * t.strides[i];
    return (last + 1) * width(t.type);
}
// A convolution as both calls have it.
struct Convolution {
    TensorDescriptor X, W, Y;
    ConvDescriptor D;
    const void *x, *w, *bias = nullptr, *z = nullptr;
    void *y, *workspace;
    size_t workspace_bytes;
    float alpha, beta; // of the sums, and of z
    bool relu = false;

    size_t depth() const { return (size_t)W.dims[1] * W.dims[2] * W.dims[3]; }
    uint64_t operations() const { return 2 * depth() * Y.dims[2] * Y.dims[3] * Y.dims[1] * X.dims[0]; }
    int check() const {
        auto expected = [&](int i) { return (X.dims[2 + i] + 2 * D.pad[i] - D.dilation[i] * (W.dims[2 + i] - 1) - 1) / D.stride[i] + 1; };
        if (X.dims[1] != W.dims[1] || Y.dims[1] != W.dims[0] || X.dims[0] != Y.dims[0] || Y.dims[2] != expected(0) || Y.dims[3] != expected(1)) return 2000; // CUDNN_STATUS_BAD_PARAM
        if (X.type != W.type || X.type != Y.type || D.mode != 1) return 3000; // CUDNN_STATUS_NOT_SUPPORTED
        if (D.compute != 0 && !(D.compute == 2 && X.type == F16)) return 3000;
        auto one = [](const TensorDescriptor &t) { return t.dims[1] == 1 || t.dims[2] * t.dims[3] == 1; }; // lies alike in both orders
        auto last = [](const TensorDescriptor &t) { return t.strides[1] == 1; };
        if (!one(X) && !one(W) && last(X) != last(W)) return 3000; // a filter in the other order than its map
        return workspace_bytes < workspace_of(D, W, Y) ? 2000 : 0;
    }
    void run(const std::string &name) const {
        sim_touch((name + " x").c_str(), 3, x, extent_of(X));
        sim_touch((name + " w").c_str(), 5, w, extent_of(W));
        sim_touch((name + " y").c_str(), 12, y, extent_of(Y));
        if (bias) sim_touch((name + " bias").c_str(), 14, bias, Y.dims[1] * width(Y.type));
        if (z && z != y && beta != 0) sim_touch((name + " z").c_str(), 12, z, extent_of(Y));
        if (workspace) sim_touch((name + " workspace").c_str(), 8, workspace, workspace_bytes);
        if (sim_flag("SIM_SKIP")) return;
        SimTimer timer(SIM_CONV);
        // cuDNN's own default lets float32 be multiplied as TF32; CUDNN_FMA_MATH (3) does not.
        bool halves = D.compute == 2 && !sim_flag("SIM_HALF_SUMS_IN_F32"), tf32 = X.type == F32 && D.math != 3 && sim_flag("SIM_TF32");
        int inputs = W.dims[1], outputs = W.dims[0], kh = W.dims[2], kw = W.dims[3], oh = Y.dims[2], ow = Y.dims[3];
        size_t k = depth(), n = (size_t)oh * ow;
        std::vector<float> weights(outputs * k), columns(k * n), result(outputs * n);
        for (int o = 0; o < outputs; o++)
            for (int c = 0; c < inputs; c++)
                for (int fy = 0; fy < kh; fy++)
                    for (int fx = 0; fx < kw; fx++) {
                        float v = load(W.type, w, (size_t)o * W.strides[0] + (size_t)c * W.strides[1] + (size_t)fy * W.strides[2] + (size_t)fx * W.strides[3]);
                        weights[o * k + ((size_t)c * kh + fy) * kw + fx] = tf32 ? to_tf32(v) : v;
                    }
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
                        float more = (beta == 0 ? 0 : beta * load(Y.type, z, at)) + (bias ? load(Y.type, bias, o) : 0);
                        float value = alpha * result[o * n + (size_t)py * ow + px] + more;
                        store(Y.type, y, at, relu && value < 0 ? 0 : value);
                    }
        }
        sim_check_finite(name.c_str(), "fhb"[Y.type], y, extent_of(Y));
    }
};
int cudnnConvolutionForward(Handle handle, const void *alpha, Handle xd, const void *x, Handle wd, const void *w, Handle cd, int, void *workspace, size_t workspace_bytes,
                            const void *beta, Handle yd, void *y) {
    Convolution c{*(TensorDescriptor *)xd, *(TensorDescriptor *)wd, *(TensorDescriptor *)yd, *(ConvDescriptor *)cd, x, w, nullptr, y, y, workspace, workspace_bytes,
                  *(const float *)alpha, *(const float *)beta};
    if (int status = c.check()) return status;
    SimOnStream on(stream_of(handle));
    return sim_enqueue("cudnnConvolutionForward", c.operations(), [=] { c.run("cudnnConvolutionForward"); });
}
// y = activation(alpha1 conv(x) + alpha2 z + bias)
int cudnnConvolutionBiasActivationForward(Handle handle, const void *alpha1, Handle xd, const void *x, Handle wd, const void *w, Handle cd, int algorithm, void *workspace,
                                          size_t workspace_bytes, const void *alpha2, Handle zd, const void *z, Handle bd, const void *bias, Handle ad, Handle yd, void *y) {
    const TensorDescriptor &Y = *(TensorDescriptor *)yd, &Z = *(TensorDescriptor *)zd, &B = *(TensorDescriptor *)bd;
    Convolution c{*(TensorDescriptor *)xd, *(TensorDescriptor *)wd, Y, *(ConvDescriptor *)cd, x, w, bias, z, y, workspace, workspace_bytes,
                  *(const float *)alpha1, *(const float *)alpha2, ((ActivationDescriptor *)ad)->mode == 1};
    if (int status = c.check()) return status;
    if (!bias || !z || B.type != Y.type || B.dims[0] != 1 || B.dims[1] != Y.dims[1] || B.dims[2] != 1 || B.dims[3] != 1) return 2000;
    if (Z.type != Y.type || memcmp(Z.dims, Y.dims, sizeof Z.dims) || memcmp(Z.strides, Y.strides, sizeof Z.strides)) return 2000;
    int mode = ((ActivationDescriptor *)ad)->mode;
    if (mode == 5 && algorithm != 1) return 3000; // the identity goes with IMPLICIT_PRECOMP_GEMM alone
    if (mode != 5 && mode != 1) sim_fail("cudnnConvolutionBiasActivationForward: activation %d", mode);
    SimOnStream on(stream_of(handle));
    return sim_enqueue("cudnnConvolutionBiasActivationForward", c.operations(), [=] { c.run("cudnnConvolutionBiasActivationForward"); });
}

// ---- what the libraries say of themselves, as the newest at the time of writing did
size_t cublasLtGetVersion() { return 130100; }
size_t cudnnGetVersion() { return 91200; }
#pragma GCC visibility pop
}
