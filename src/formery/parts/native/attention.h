// Attention of some queries over the slots that each may see.
//
// A query's sums run over its visible slots in their order, sixteen at a time from the first visible one, so that
// they do not depend on other queries, on padding, or on how much room there is.
#pragma once
#include <algorithm>
#include <vector>

#include "rows.h"

// Where one layer's keys and values lie (steps in entries). slots: or FILLED, as many as are. narrow: 16 bits each.
constexpr long FILLED = -1;
struct Cache {
    void *keys, *values;
    int64_t row, head, slot, slots, narrow;
};

// Who sees whom in this pass: everything, what came before, so much of what came before, or as `allowed` says.
// bias: added to the scores. Steps by row, head and query; both are dense in slots.
enum Sight { EVERYTHING, CAUSAL, WINDOW, TABLE };
struct Seen {
    int64_t kind, window;
    const uint8_t *allowed;
    int64_t row, head, query;
    const float *bias;
    int64_t bias_row, bias_head, bias_query;
};

struct Query {
    const float *vector;
    float *result;
    const float *bias;
    std::vector<int32_t> list;
    long first, count;
    v16 top, total;
    long slot(long index) const { return list.empty() ? first + index : list[index]; }
};

static inline void look(Query &query, const Seen &seen, long slots, long row, long head, long at, long position) {
    query.list.clear();
    query.first = 0, query.count = slots;
    if (seen.kind == CAUSAL || seen.kind == WINDOW) {
        query.count = std::min<long>(position + 1, slots);
        if (seen.kind == WINDOW) query.first = std::max<long>(0, position + 1 - seen.window);
        query.count = std::max<long>(0, query.count - query.first);
    } else if (seen.kind == TABLE) {
        const uint8_t *allowed = seen.allowed + row * seen.row + head * seen.head + at * seen.query;
        for (long slot = 0; slot < slots; slot++)
            if (allowed[slot]) query.list.push_back((int32_t)slot);
        query.count = (long)query.list.size();
    }
    query.bias = seen.bias ? seen.bias + row * seen.bias_row + head * seen.bias_head + at * seen.bias_query : nullptr;
    query.top = all(-INFINITY), query.total = v16{};
}

// Fetches a slot that will be wanted soon: slots lie too far apart for the machine to foresee it.
template <typename T> static inline void fetch(const T *slot, long dim) {
    for (long i = 0; i < dim; i += 64 / (long)sizeof(T)) __builtin_prefetch(slot + i);
}

// The scores of sixteen slots; -inf for those behind the last one.
template <typename T>
static inline v16 sixteen_scores(const Query &query, const T *keys, long step, long index, long dim, float scale, float cap) {
    v16 products[16];
    long valid = std::min<long>(16, query.count - index);
    for (long j = 0; j < 16; j++) {
        const T *key = keys + query.slot(index + std::min(j, valid - 1)) * step;
        if (index + 16 + j < query.count) fetch(keys + query.slot(index + 16 + j) * step, dim);
        v16 acc{};
        long i = 0;
        for (; i + 16 <= dim; i += 16) acc = fma(load(query.vector + i), load(key + i), acc);
        if (i < dim) acc = fma(load_some(query.vector + i, dim - i), load_some(key + i, dim - i), acc);
        products[j] = acc;
    }
    v16 scores = sums16(products) * scale;
    if (cap > 0) scores = hyperbolic_tangent(scores / cap) * cap;
    for (long j = 0; query.bias && j < valid; j++) scores[j] += query.bias[query.slot(index + j)];
    for (long j = valid; j < 16; j++) scores[j] = -INFINITY;
    return scores;
}

template <typename T>
static inline void weigh(Query &query, const T *values, long step, long index, long dim, const float *weights) {
    long valid = std::min<long>(16, query.count - index);
    for (long i = 0; i < dim; i += 64) {
        long width = std::min<long>(64, dim - i), parts = (width + 15) / 16;
        v16 acc[4];
        for (long c = 0; c < parts; c++) acc[c] = ::take(query.result, i + 16 * c, std::min<long>(16, width - 16 * c));
        for (long j = 0; j < valid; j++) {
            const T *value = values + query.slot(index + j) * step + i;
            if (i == 0 && index + 16 + j < query.count) fetch(values + query.slot(index + 16 + j) * step, dim);
            v16 weight = all(weights[j]);
            if (width == 64)
                for (long c = 0; c < 4; c++) acc[c] = fma(weight, load(value + 16 * c), acc[c]);
            else
                for (long c = 0; c < parts; c++) {
                    long n = std::min<long>(16, width - 16 * c);
                    acc[c] = fma(weight, n == 16 ? load(value + 16 * c) : load_some(value + 16 * c, n), acc[c]);
                }
        }
        for (long c = 0; c < parts; c++) put(query.result, i + 16 * c, std::min<long>(16, width - 16 * c), acc[c]);
    }
}

// softmax(cap · tanh(scale · query · keyᵀ / cap) + bias) · value, for all these queries of one row and key head.
template <typename T>
static void attend(std::vector<Query> &queries, const T *keys, const T *values, long step, long dim, float scale, float cap,
                   std::vector<float> &room) {
    long longest = 0;
    for (Query &query : queries) {
        longest = std::max(longest, query.count);
        for (long i = 0; i < dim; i++) query.result[i] = 0;
    }
    long stride = (longest + 15) / 16 * 16;
    if ((long)room.size() < stride * (long)queries.size()) room.resize(stride * queries.size());
    for (long index = 0; index < longest; index += 16) {
        float *scores = room.data() + index;
        for (Query &query : queries) {
            if (index < query.count) {
                v16 found = sixteen_scores(query, keys, step, index, dim, scale, cap);
                query.top = larger(query.top, found);
                store(scores, found);
            }
            scores += stride;
        }
    }
    for (Query &query : queries) query.top = all(most(query.top));
    for (long index = 0; index < longest; index += 16) {
        float *scores = room.data() + index;
        for (Query &query : queries) {
            if (index < query.count) {
                v16 weights = exponential(load(scores) - query.top);
                query.total += weights;
                store(scores, weights);
                weigh(query, values, step, index, dim, scores);
            }
            scores += stride;
        }
    }
    for (Query &query : queries) {
        float share = query.count ? 1.0f / sum(query.total) : 0.0f;
        for (long i = 0; i < dim; i++) query.result[i] *= share;
    }
}
