// What is done to each row by itself: norms, activations, rotary positions.
#pragma once
#include <cmath>

#include "vector.h"

template <typename Each> static inline void by_sixteen(long width, Each each) {
    long i = 0;
    for (; i + 16 <= width; i += 16) each(i, 16L);
    if (i < width) each(i, width - i);
}

static inline v16 take(const float *x, long i, long count) { return count == 16 ? load(x + i) : load_some(x + i, count); }
static inline void put(float *y, long i, long count, v16 x) { count == 16 ? store(y + i, x) : store_some(y + i, x, count); }

// (x - mean) / sqrt(variance + epsilon) · weight + shift
static inline void layer_norm(const float *x, float *y, long width, float epsilon, const float *weight, const float *shift) {
    v16 total{};
    by_sixteen(width, [&](long i, long n) { total += take(x, i, n); });
    float mean = sum(total) / width;
    v16 squares{};
    by_sixteen(width, [&](long i, long n) {
        v16 off = take(x, i, n) - mean;
        if (n < 16)
            for (long j = n; j < 16; j++) off[j] = 0;
        squares = fma(off, off, squares);
    });
    float scale = 1.0f / sqrtf(sum(squares) / width + epsilon);
    by_sixteen(width, [&](long i, long n) {
        v16 z = (take(x, i, n) - mean) * scale;
        if (weight) z = z * take(weight, i, n);
        if (shift) z = z + take(shift, i, n);
        put(y, i, n, z);
    });
}

// x / sqrt(mean(x²) + epsilon) · (offset + weight)
static inline void rms_norm(const float *x, float *y, long width, float epsilon, const float *weight, float offset) {
    v16 squares{};
    by_sixteen(width, [&](long i, long n) {
        v16 one = take(x, i, n);
        squares = fma(one, one, squares);
    });
    float scale = 1.0f / sqrtf(sum(squares) / width + epsilon);
    by_sixteen(width, [&](long i, long n) { put(y, i, n, take(x, i, n) * scale * (take(weight, i, n) + offset)); });
}

enum Activation { IDENTITY, RELU, RELU2, GELU, GELU_TANH, QUICK_GELU, SILU, TANH, SIGMOID };

static inline v16 activated(v16 x, long activation) {
    switch (activation) {
    case RELU: return larger(x, v16{});
    case RELU2: return larger(x, v16{}) * larger(x, v16{});
    case GELU: return x * below(x);
    case GELU_TANH: return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
    case QUICK_GELU: return x * logistic(1.702f * x);
    case SILU: return x * logistic(x);
    case TANH: return hyperbolic_tangent(x);
    case SIGMOID: return logistic(x);
    default: return x;
    }
}

static inline void activate(float *y, long width, long activation) {
    if (activation != IDENTITY)
        by_sixteen(width, [&](long i, long n) { put(y, i, n, activated(take(y, i, n), activation)); });
}

// Turns the pairs of each head by position · frequency.
static inline void rotate(float *x, long heads, long dim, long turned, bool interleaved, float magnitude,
                          const float *frequencies, long position, float *cosine, float *sine) {
    long half = turned / 2;
    for (long i = 0; i < half; i++) {
        float angle = (float)(position < 0 ? 0 : position) * frequencies[i];
        cosine[i] = cosf(angle) * magnitude, sine[i] = sinf(angle) * magnitude;
    }
    for (long h = 0; h < heads; h++, x += dim)
        for (long i = 0; i < half; i++) {
            float *first = x + (interleaved ? 2 * i : i), *second = x + (interleaved ? 2 * i + 1 : i + half);
            float a = *first, b = *second;
            *first = a * cosine[i] - b * sine[i];
            *second = b * cosine[i] + a * sine[i];
        }
}
