// Sixteen numbers at a time, and the few functions of them that the kernels need.
//
// Every sum has one fixed order, whatever the width of the machine's registers: sixteen partial sums, folded in halves.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t bf16;

static inline v16 all(float x) { return v16{} + x; }
static inline v16 load(const float *p) { return *(const v16u *)p; }
static inline void store(float *p, v16 x) { *(v16u *)p = x; }

// The first `count` numbers, zeros behind them.
static inline v16 load_some(const float *p, long count) {
#if defined(__AVX512F__)
    return (v16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
    v16 x{};
    memcpy(&x, p, sizeof(float) * count);
    return x;
#endif
}

static inline void store_some(float *p, v16 x, long count) { memcpy(p, &x, sizeof(float) * count); }

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// To the nearest 16 bits, ties to even.
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)(bits >> 16 | 64);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline v16 load(const bf16 *p) {
#if defined(__AVX512F__)
    return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    v16 x;
    for (int i = 0; i < 16; i++) x[i] = widen(p[i]);
    return x;
#endif
}

static inline v16 load_some(const bf16 *p, long count) {
    v16 x{};
    for (long i = 0; i < count; i++) x[i] = widen(p[i]);
    return x;
}

static inline v16 fma(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    typedef float v8 __attribute__((vector_size(32)));
    v8 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = (v8)_mm256_fmadd_ps((__m256)x[i], (__m256)y[i], (__m256)z[i]);
    memcpy(&c, z, 64);
    return c;
#else
    v16 y;
    for (int i = 0; i < 16; i++) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
#endif
}

static inline v16 larger(v16 a, v16 b) { return a > b ? a : b; }
static inline v16 smaller(v16 a, v16 b) { return a < b ? a : b; }

#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define FOLD8(a, b)                                                                                  \
    (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                         \
     SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD4(a, b)                                                                                  \
    (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                       \
     SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define FOLD2(a, b)                                                                                  \
    (SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +                       \
     SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define FOLD1(a, b)                                                                                  \
    (SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +                      \
     SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))

// The sums of four vectors, in the first four places of one.
static inline v16 sums4(v16 a, v16 b, v16 c, v16 d) {
    v16 x = FOLD4(FOLD8(a, b), FOLD8(c, d));
    x = FOLD2(x, x);
    return FOLD1(x, x);
}

static inline float sum(v16 a) { return sums4(a, a, a, a)[0]; }

// The sums of sixteen vectors, in order.
static inline v16 sums16(const v16 *a) {
    v16 x[4];
    for (int i = 0; i < 4; i++) {
        v16 y = FOLD4(FOLD8(a[4 * i], a[4 * i + 1]), FOLD8(a[4 * i + 2], a[4 * i + 3]));
        x[i] = y;
    }
    return FOLD1(FOLD2(x[0], x[1]), FOLD2(x[2], x[3]));
}

static inline float most(v16 a) {
    float best = a[0];
    for (int i = 1; i < 16; i++) best = a[i] > best ? a[i] : best;
    return best;
}

// e^x to two units of rounding; 0 below -87, infinite above 88.
static inline v16 exponential(v16 x) {
    v16 inside = larger(smaller(x, all(88.0f)), all(-87.3f));
    v16 turns = inside * 1.44269504f;
    v16 whole = (turns + 12582912.0f) - 12582912.0f;  // to the nearest integer
    v16 rest = fma(whole, all(-0.693359375f), inside);
    rest = fma(whole, all(2.12194440e-4f), rest);
    v16 y = all(1.9875691500e-4f);
    y = fma(y, rest, all(1.3981999507e-3f));
    y = fma(y, rest, all(8.3334519073e-3f));
    y = fma(y, rest, all(4.1665795894e-2f));
    y = fma(y, rest, all(1.6666665459e-1f));
    y = fma(y, rest, all(5.0000001201e-1f));
    y = fma(y, rest * rest, rest + 1.0f);
    i16 power = (__builtin_convertvector(whole, i16) + 127) << 23;
    v16 scale;
    memcpy(&scale, &power, 64);
    v16 large = x > 88.0f ? all(__builtin_inff()) : y * scale;
    return x < -87.3f ? v16{} : large;
}

static inline v16 hyperbolic_tangent(v16 x) {
    v16 size = x < 0.0f ? -x : x;
    v16 e = exponential(-2.0f * size);
    v16 far = (1.0f - e) / (1.0f + e), square = x * x;
    // Near zero the quotient loses digits; there the series x - x³/3 + 2x⁵/15 - 17x⁷/315 + 62x⁹/2835 holds.
    v16 near = all(62.0f / 2835), one = all(1.0f);
    near = fma(near, square, all(-17.0f / 315));
    near = fma(near, square, all(2.0f / 15));
    near = fma(near, square, all(-1.0f / 3));
    near = x * fma(near, square, one);
    return size < 0.15f ? near : (x < 0.0f ? -far : far);
}

static inline v16 logistic(v16 x) { return 1.0f / (1.0f + exponential(-x)); }

// y = c[0] + c[1] · x + c[2] · x² + …
template <int N> static inline v16 polynomial(v16 x, const float (&c)[N]) {
    v16 y = all(c[N - 1]);
    for (int i = N - 2; i >= 0; i--) y = fma(y, x, all(c[i]));
    return y;
}

// The normal distribution's share below x, (1 + erf(x / √2)) / 2, to two units of rounding.
//
// Fitted at Chebyshev's points: erf(t) / t in t² up to 0.92, and -ln(1 - erf(t)) from there to 4; beyond is nothing.
static inline v16 below(v16 x) {
    static const float near[] = {1.128379166f,     -0.3761263217f,    0.1128367102f,    -0.02685803196f,
                                 5.197642556e-3f, -8.104441949e-4f, 8.209796839e-5f};
    static const float far[] = {-3.002688247e-4f, 1.130155102f,      0.6319562413f,    0.1099607994f, -0.02635512078f,
                                4.736950623e-3f, -5.920927583e-4f, 4.551277296e-5f, -1.610240418e-6f};
    v16 t = (x < 0.0f ? -x : x) * 0.70710678f;
    v16 inner = 0.5f * t * polynomial(t * t, near);
    v16 outer = 0.5f * exponential(-polynomial(smaller(t, all(4.0f)), far));
    v16 tail = t > 0.92f ? (t > 4.0f ? v16{} : outer) : 0.5f - inner;
    v16 most = t > 0.92f ? 1.0f - tail : 0.5f + inner;
    return x < 0.0f ? tail : most;
}
