// Products of rows with a weight matrix: outputs[row, o] = Σ_i inputs[row, i] · weight[o, i].
//
// The weights are read where they lie, [outputs, inputs], once. A sum runs over sixteen partial sums (thirty-two
// products at a time in 16 bits), in blocks of BLOCK inputs, so that it is the same however many rows there are.
#pragma once
#include "vector.h"

constexpr long BLOCK = 1024;
constexpr long AHEAD = 12 << 10;  // bytes: how far ahead of a tile weights are fetched, at most

// How many entries ahead of a tile with O rows of weights: those that the next tile wants.
template <int O, typename T> static inline long ahead(long inputs) {
    long most = AHEAD / (long)sizeof(T);
    return O * inputs < most ? O * inputs : most;
}

// The partial sums of `block` inputs of one row with one row of weights.
static inline v16 partial(const float *x, const float *w, long block) {
    v16 acc{};
    long i = 0;
    for (; i + 16 <= block; i += 16) acc = fma(load(x + i), load(w + i), acc);
    return i < block ? fma(load_some(x + i, block - i), load_some(w + i, block - i), acc) : acc;
}

// `block` inputs of R rows with O rows of weights: adds the sums to `sums`.
template <int R, int O>
static inline void tile(const float *x, long across, const float *w, long inputs, long block, float (*sums)[4]) {
    v16 acc[R][O] = {};
    long i = 0, next = ahead<O, float>(inputs);
    for (; i + 16 <= block; i += 16) {
        v16 weights[O];
        for (int o = 0; o < O; o++) {
            weights[o] = load(w + o * inputs + i);
            __builtin_prefetch(w + o * inputs + i + next, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            v16 values = load(x + r * across + i);
            for (int o = 0; o < O; o++) acc[r][o] = fma(values, weights[o], acc[r][o]);
        }
    }
    if (i < block)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                acc[r][o] = fma(load_some(x + r * across + i, block - i), load_some(w + o * inputs + i, block - i),
                                acc[r][o]);
    for (int r = 0; r < R; r++) {
        v16 four = sums4(acc[r][0], acc[r][O > 1 ? 1 : 0], acc[r][O > 2 ? 2 : 0], acc[r][O > 3 ? 3 : 0]);
        for (int o = 0; o < O; o++) sums[r][o] += four[o];
    }
}

#if defined(__AVX512BF16__)
static inline __m512bh load_pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline __m512bh load_pairs(const bf16 *p, long count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
}

static inline v16 partial(const bf16 *x, const bf16 *w, long block) {
    __m512 acc{};
    long i = 0;
    for (; i + 32 <= block; i += 32) acc = _mm512_dpbf16_ps(acc, load_pairs(x + i), load_pairs(w + i));
    return (v16)(i < block ? _mm512_dpbf16_ps(acc, load_pairs(x + i, block - i), load_pairs(w + i, block - i)) : acc);
}

template <int R, int O>
static inline void tile(const bf16 *x, long across, const bf16 *w, long inputs, long block, float (*sums)[4]) {
    __m512 acc[R][O] = {};
    long i = 0, next = ahead<O, bf16>(inputs);
    for (; i + 32 <= block; i += 32) {
        __m512bh weights[O];
        for (int o = 0; o < O; o++) {
            weights[o] = load_pairs(w + o * inputs + i);
            __builtin_prefetch(w + o * inputs + i + next, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            __m512bh values = load_pairs(x + r * across + i);
            for (int o = 0; o < O; o++) acc[r][o] = _mm512_dpbf16_ps(acc[r][o], values, weights[o]);
        }
    }
    if (i < block)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                acc[r][o] = _mm512_dpbf16_ps(acc[r][o], load_pairs(x + r * across + i, block - i),
                                             load_pairs(w + o * inputs + i, block - i));
    for (int r = 0; r < R; r++) {
        v16 four = sums4((v16)acc[r][0], (v16)acc[r][O > 1 ? 1 : 0], (v16)acc[r][O > 2 ? 2 : 0],
                         (v16)acc[r][O > 3 ? 3 : 0]);
        for (int o = 0; o < O; o++) sums[r][o] += four[o];
    }
}
#else
static inline v16 partial(const bf16 *x, const bf16 *w, long block) {
    v16 acc{};
    long i = 0;
    for (; i + 16 <= block; i += 16) acc = fma(load(x + i), load(w + i), acc);
    return i < block ? fma(load_some(x + i, block - i), load_some(w + i, block - i), acc) : acc;
}

template <int R, int O>
static inline void tile(const bf16 *x, long across, const bf16 *w, long inputs, long block, float (*sums)[4]) {
    v16 acc[R][O] = {};
    for (long i = 0; i < block; i += 16) {
        long count = block - i < 16 ? block - i : 16;
        for (int o = 0; o < O; o++) {
            const bf16 *at = w + o * inputs + i;
            v16 weights = count == 16 ? load(at) : load_some(at, count);
            for (int r = 0; r < R; r++) {
                const bf16 *from = x + r * across + i;
                acc[r][o] = fma(count == 16 ? load(from) : load_some(from, count), weights, acc[r][o]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) sums[r][o] += sum(acc[r][o]);
}
#endif

#if defined(__AVX512F__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 3;
#endif

// Tiles of as equal a number of rows as can be: where the tile begins, and how many rows it has.
struct Tiles {
    long rows, count = (rows + ROWS - 1) / ROWS;
    long first(long tile) const { return tile * (rows / count) + (tile < rows % count ? tile : rows % count); }
};

// One row with up to four rows of weights, each read from end to end: that the machine foresees, and fetches fastest.
template <typename T>
static inline void one_row(const T *x, const T *w, long inputs, long outputs, float *sums) {
    constexpr int BLOCKS = 8;
    for (long at = 0; at < inputs; at += BLOCKS * BLOCK) {
        v16 acc[BLOCKS][4] = {};
        int blocks = 0;
        for (long o = 0; o < outputs; o++) {
            blocks = 0;
            for (long i = at; i < inputs && blocks < BLOCKS; i += BLOCK)
                acc[blocks++][o] = partial(x + i, w + o * inputs + i, inputs - i < BLOCK ? inputs - i : BLOCK);
        }
        for (int b = 0; b < blocks; b++) {
            v16 four = sums4(acc[b][0], acc[b][1], acc[b][2], acc[b][3]);
            for (long o = 0; o < outputs; o++) sums[o] += four[o];
        }
    }
}

// R rows with `outputs` rows of weights, four at a time; `take(row, o, sum)` gets each result.
template <int R, typename T, typename Take>
static inline void rows_by_outputs(const T *x, long across, const T *w, long inputs, long outputs, Take take) {
    for (long o = 0; o < outputs; o += 4) {
        float sums[R][4] = {};
        if constexpr (R == 1) one_row(x, w + o * inputs, inputs, outputs - o < 4 ? outputs - o : 4, sums[0]);
        for (long i = 0; R > 1 && i < inputs; i += BLOCK) {
            long block = inputs - i < BLOCK ? inputs - i : BLOCK;
            const T *from = x + i, *at = w + o * inputs + i;
            switch (outputs - o) {
            case 1: tile<R, 1>(from, across, at, inputs, block, sums); break;
            case 2: tile<R, 2>(from, across, at, inputs, block, sums); break;
            case 3: tile<R, 3>(from, across, at, inputs, block, sums); break;
            default: tile<R, 4>(from, across, at, inputs, block, sums);
            }
        }
        long count = outputs - o < 4 ? outputs - o : 4;
        for (int r = 0; r < R; r++)
            for (int j = 0; j < count; j++) take(r, o + j, sums[r][j]);
    }
}

// All rows with the outputs first … last - 1, in strips of weights that stay in the cache while the rows go by.
template <typename T, typename Take>
static void multiply(const T *x, long across, long rows, const T *w, long inputs, long first, long last, Take take) {
    Tiles tiles{rows};
    long strip = tiles.count == 1 ? last - first : (192 << 10) / (long)(inputs * sizeof(T)) / 4 * 4;
    if (tiles.count == 2 || strip < 4) strip = 4;
    for (long o = first; o < last; o += strip) {
        long outputs = last - o < strip ? last - o : strip;
        for (long t = 0; t < tiles.count; t++) {
            long row = tiles.first(t), count = tiles.first(t + 1) - row;
            auto here = [&](long r, long j, float sum) { take(row + r, o + j, sum); };
            const T *from = x + row * across, *at = w + o * inputs;
            switch (count) {
            case 1: rows_by_outputs<1>(from, across, at, inputs, outputs, here); break;
            case 2: rows_by_outputs<2>(from, across, at, inputs, outputs, here); break;
            case 3: rows_by_outputs<3>(from, across, at, inputs, outputs, here); break;
#if defined(__AVX512F__)
            case 4: rows_by_outputs<4>(from, across, at, inputs, outputs, here); break;
            case 5: rows_by_outputs<5>(from, across, at, inputs, outputs, here); break;
            default: rows_by_outputs<6>(from, across, at, inputs, outputs, here);
#endif
            }
        }
    }
}
