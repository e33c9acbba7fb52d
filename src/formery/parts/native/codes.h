// Products of rows with weights of 8 or 4 bits, sixteen outputs at a time.
//
// Inputs become integers of 16 bits, one scale a row, as a high and a low byte; so all sums are of integers, exact in
// any order. Weights are stored with an offset that makes them positive; it is taken off with the inputs' own sums.
#pragma once
#include "rows.h"

typedef int8_t bytes16 __attribute__((vector_size(16)));

constexpr long GROUP = 32;    // inputs that share a scale, where weights have 4 bits
constexpr float LARGEST = 32512.0f;  // 127 · 256: what an input's largest entry becomes

constexpr long FETCHED = 24 << 10;   // bytes: how far ahead weights are fetched, at most

// Rows of inputs as integers; `sums` hold those of each group of inputs, high bytes before low ones.
struct Whole {
    int8_t *high, *low;
    int32_t *sums;
    float *scales;
    long padded, groups;
    static long bytes(long rows, long inputs) {
        long padded = (inputs + GROUP - 1) / GROUP * GROUP;
        return rows * (2 * padded + padded / GROUP * 8 + 4) + 256;
    }
    Whole(void *room, long rows, long inputs) {
        padded = (inputs + GROUP - 1) / GROUP * GROUP, groups = padded / GROUP;
        high = (int8_t *)room, low = high + rows * padded;
        sums = (int32_t *)(low + rows * padded), scales = (float *)(sums + rows * groups * 2);
    }
    void take(const float *x, long row, long inputs) {
        v16 size{};
        by_sixteen(inputs, [&](long i, long n) {
            v16 value = ::take(x, i, n);
            size = larger(larger(value, -value), size);
        });
        float top = most(size), scale = top > 0 ? top / LARGEST : 1.0f, inverse = 1.0f / scale;
        scales[row] = scale;
        int8_t *h = high + row * padded, *l = low + row * padded;
        for (long g = 0; g < groups; g++) {
            i16 highs{}, lows{};
            for (long i = g * GROUP; i < (g + 1) * GROUP; i += 16) {
                long count = inputs - i < 16 ? inputs - i : 16;
                v16 value = count > 0 ? ::take(x, i, count) * inverse : v16{};
                i16 whole = __builtin_convertvector(value + (value < 0.0f ? all(-0.5f) : all(0.5f)), i16);
                i16 upper = (whole + 128) >> 8, lower = whole - (upper << 8);
                bytes16 first = __builtin_convertvector(upper, bytes16);
                bytes16 second = __builtin_convertvector(lower, bytes16);
                memcpy(h + i, &first, 16), memcpy(l + i, &second, 16);
                highs += upper, lows += lower;
            }
            int32_t *into = sums + (row * groups + g) * 2;
            into[0] = into[1] = 0;
            for (int j = 0; j < 16; j++) into[0] += highs[j], into[1] += lows[j];
        }
    }
};

// acc + Σ over four bytes of each place: weights (positive) times the same four inputs.
static inline i16 dot(i16 acc, i16 weights, int32_t inputs) {
#if defined(__AVX512VNNI__)
    return (i16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(inputs));
#else
    for (int b = 0; b < 4; b++) acc += (weights >> (8 * b) & 255) * (int32_t)(int8_t)(inputs >> (8 * b));
    return acc;
#endif
}

static inline int32_t four(const int8_t *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

static inline i16 codes(const uint8_t *p) {
    i16 x;
    memcpy(&x, p, 64);
    return x;
}

static inline v16 halves(const uint16_t *p) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    v16 x;
    for (int i = 0; i < 16; i++) {
        uint32_t sign = (p[i] & 0x8000u) << 16, rest = p[i] & 0x7fffu;
        uint32_t bits = rest << 13;
        float y;
        memcpy(&y, &bits, 4);
        y *= 5.192296858534828e33f;  // 2^112: the difference of the two formats' exponents
        memcpy(&bits, &y, 4);
        bits |= sign;
        memcpy(&y, &bits, 4);
        x[i] = y;
    }
    return x;
#endif
}

// R rows with P panels of sixteen outputs, 8 bits: weights [panel][inputs / 4][16][4].
template <int R, int P>
static inline void panels8(const Whole &x, long row, const uint8_t *w, const float *scales, v16 (*y)[P]) {
    i16 high[R][P] = {}, low[R][P] = {};
    constexpr int Q = R == 1 ? 1 : P;  // one row reads its weights from end to end, which the machine foresees
    long next = P * 16 * x.padded < FETCHED ? P * 16 * x.padded : FETCHED;
    for (int q = 0; q < P; q += Q)
        for (long i = 0; i < x.padded; i += 4) {
            i16 weights[P];
            for (int p = q; p < q + Q; p++) {
                const uint8_t *at = w + p * 16 * x.padded + i * 16;
                weights[p] = codes(at);
                if (R == 2) __builtin_prefetch(at + next, 0, 2);
            }
            for (int r = 0; r < R; r++) {
                int32_t h = four(x.high + (row + r) * x.padded + i), l = four(x.low + (row + r) * x.padded + i);
                for (int p = q; p < q + Q; p++) {
                    high[r][p] = dot(high[r][p], weights[p], h);
                    low[r][p] = dot(low[r][p], weights[p], l);
                }
            }
        }
    for (int r = 0; r < R; r++) {
        int32_t highs = 0, lows = 0;
        const int32_t *sums = x.sums + (row + r) * x.groups * 2;
        for (long g = 0; g < x.groups; g++) highs += sums[2 * g], lows += sums[2 * g + 1];
        for (int p = 0; p < P; p++) {
            v16 upper = __builtin_convertvector(high[r][p] - 128 * highs, v16);
            v16 lower = __builtin_convertvector(low[r][p] - 128 * lows, v16);
            y[r][p] = fma(upper, all(256.0f), lower) * (x.scales[row + r] * load(scales + p * 16));
        }
    }
}

// The same with 4 bits: weights [panel][group][4][64], two codes a byte; a scale of 16 bits for each output and group.
template <int R, int P>
static inline void panels4(const Whole &x, long row, const uint8_t *w, const uint16_t *scales, v16 (*y)[P]) {
    v16 acc[R][P] = {};
    auto one = [&](long g, int p) {
        const uint8_t *at = w + (p * x.groups + g) * 256;
        i16 pairs[8];
        for (int j = 0; j < 4; j++) {
            i16 both = codes(at + 64 * j);
            pairs[2 * j] = both & 0x0f0f0f0f, pairs[2 * j + 1] = both >> 4 & 0x0f0f0f0f;
            if (R > 1) __builtin_prefetch(at + 64 * j + FETCHED, 0, 2);
        }
        v16 scale = halves(scales + (p * x.groups + g) * 16);
        for (int r = 0; r < R; r++) {
            const int32_t *sums = x.sums + ((row + r) * x.groups + g) * 2;
            i16 high = i16{} - 8 * sums[0], low = i16{} - 8 * sums[1];
            const int8_t *h = x.high + (row + r) * x.padded + g * GROUP;
            const int8_t *l = x.low + (row + r) * x.padded + g * GROUP;
            for (int j = 0; j < 8; j++) {
                high = dot(high, pairs[j], four(h + 4 * j));
                low = dot(low, pairs[j], four(l + 4 * j));
            }
            acc[r][p] = fma(__builtin_convertvector((high << 8) + low, v16), scale, acc[r][p]);
        }
    };
    if constexpr (R == 1) {
        for (int p = 0; p < P; p++)
            for (long g = 0; g < x.groups; g++) one(g, p);
    } else {
        for (long g = 0; g < x.groups; g++)
            for (int p = 0; p < P; p++) one(g, p);
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) y[r][p] = acc[r][p] * x.scales[row + r];
}

template <int BITS, int R, int P, typename Take>
static inline void some_panels(const Whole &x, long row, const uint8_t *w, const void *scales, long first, long outputs,
                               Take take) {
    v16 y[R][P];
    const uint8_t *at = w + first * (16 * x.padded * BITS / 8);
    if constexpr (BITS == 8)
        panels8<R, P>(x, row, at, (const float *)scales + first * 16, y);
    else
        panels4<R, P>(x, row, at, (const uint16_t *)scales + first * 16 * x.groups, y);
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            for (int j = 0; j < 16; j++)
                if ((first + p) * 16 + j < outputs) take(row + r, (first + p) * 16 + j, y[r][p][j]);
}

template <int BITS, int R, typename Take>
static inline void rows_by_panels(const Whole &x, long row, const uint8_t *w, const void *scales, long first, long last,
                                  long outputs, Take take) {
    constexpr int P = R <= 2 ? 4 : 2;
    for (; first + P <= last; first += P) some_panels<BITS, R, P>(x, row, w, scales, first, outputs, take);
    for (; first < last; first++) some_panels<BITS, R, 1>(x, row, w, scales, first, outputs, take);
}

// All rows with the panels first … last - 1; four panels stay in the cache while the rows go by.
template <int BITS, typename Take>
static void multiply_codes(const Whole &x, long rows, const uint8_t *w, const void *scales, long outputs, long first,
                           long last, Take take) {
    long tiles = (rows + 3) / 4;
    for (long panel = first; panel < last; panel += 4) {
        long end = panel + 4 < last ? panel + 4 : last;
        for (long t = 0, row = 0; t < tiles; t++) {
            long count = (rows - row + tiles - t - 1) / (tiles - t);
            switch (count) {
            case 1: rows_by_panels<BITS, 1>(x, row, w, scales, panel, end, outputs, take); break;
            case 2: rows_by_panels<BITS, 2>(x, row, w, scales, panel, end, outputs, take); break;
            case 3: rows_by_panels<BITS, 3>(x, row, w, scales, panel, end, outputs, take); break;
            default: rows_by_panels<BITS, 4>(x, row, w, scales, panel, end, outputs, take);
            }
            row += count;
        }
    }
}

// The weights of one output: what an embedding takes from its table.
template <int BITS>
static inline void weights_of(const uint8_t *w, const void *scales, long inputs, long output, float *y) {
    long groups = (inputs + GROUP - 1) / GROUP, panel = output / 16, place = output % 16;
    const uint8_t *at = w + panel * 16 * groups * GROUP * BITS / 8 + place * 4;
    for (long g = 0; g < groups; g++) {
        float scale = BITS == 8 ? ((const float *)scales)[output]
                                : halves((const uint16_t *)scales + (panel * groups + g) * 16)[place];
        for (long i = g * GROUP; i < inputs && i < (g + 1) * GROUP; i++) {
            if constexpr (BITS == 8) {
                y[i] = (at[i / 4 * 64 + i % 4] - 128) * scale;
            } else {
                uint8_t both = at[i / 8 * 64 + i % 4];
                y[i] = ((i / 4 % 2 ? both >> 4 : both & 15) - 8) * scale;
            }
        }
    }
}
