// A list of steps over rows of numbers: one call runs a whole stack of layers.
//
// A step falls into pieces that do not depend on each other, and threads take pieces one by one. A step is over when all
// its pieces are done; nobody waits for a thread that has none, so that a thread which another program has pushed
// off its core holds nothing up.
#include <omp.h>
#include <sched.h>

#include <atomic>

#include "attention.h"
#include "codes.h"
#include "linear.h"
#include "rows.h"

enum Kind { SCALE, ADD, NORM, NARROW, LINEAR, ROTATE, APPEND, ATTEND, CAP };
enum Store { FULL, BRAIN, BYTE, NIBBLE };
enum Into { SET, PLUS, TIMES };

// One step; what the letters mean is told where the step is done.
struct Step {
    int32_t kind, from, to, extra;
    int64_t a, b, c, d;
    double e, f;
    const void *p, *q, *r;
};

struct Pass {
    int64_t batch, time, threads, filled;
    const int64_t *positions, *starts;  // of each token; the slot of each row's first token
    float **registers;
    void *room;  // for inputs in the form that narrow weights want
    Cache *caches;
    const Seen *sights;
    double *seconds;  // for each step, or null
};

// How many pieces the rows make, and which rows piece `i` has.
struct Share {
    long rows, pieces;
    Share(long rows, const Pass &pass) : rows(rows), pieces(std::min<long>(rows, pass.threads * 4)) {}
    long first(long i) const { return rows * i / pieces; }
};

static long rows_of(const Pass &pass) { return pass.batch * pass.time; }

static void norm(const Step &step, const Pass &pass, long row) {
    // a: width; b: how many lie in a row; c: 1 for RMS; e: epsilon; f: offset; p: weight; q: shift
    const float *x = pass.registers[step.from] + row * step.a, *weight = (const float *)step.p;
    float *y = pass.registers[step.to] + row * step.a;
    if (step.c)
        rms_norm(x, y, step.a, (float)step.e, weight, (float)step.f);
    else
        layer_norm(x, y, step.a, (float)step.e, weight, (const float *)step.q);
}

static void narrow(const Step &step, const Pass &pass, long row) {
    // a: inputs; c: for which store
    const float *x = pass.registers[step.from] + row * step.a;
    if (step.c == BRAIN)
        for (long i = 0; i < step.a; i++) ((bf16 *)pass.room)[row * step.a + i] = narrow(x[i]);
    else
        Whole(pass.room, rows_of(pass), step.a).take(x, row, step.a);
}

// Outputs that one piece of a product has: a multiple of sixteen, so that pieces do not change how sums are made.
static long outputs_each(const Step &step, const Pass &pass) {
    return std::clamp<long>(step.b / (pass.threads * 8) / 16 * 16, 16, 256);
}

static void linear(const Step &step, const Pass &pass, long piece) {
    // a: inputs; b: outputs; c: store; d: activation; extra: into; p: weights; q: their scales; r: bias
    long rows = rows_of(pass), inputs = step.a, outputs = step.b, each = outputs_each(step, pass);
    long first = piece * each, last = std::min(outputs, first + each), end = (last + 15) / 16;
    float *y = pass.registers[step.to];
    const float *bias = (const float *)step.r;
    const uint8_t *bytes = (const uint8_t *)step.p;
    auto take = [&](long row, long o, float sum) {
        float *at = y + row * outputs + o;
        if (bias) sum += bias[o];
        *at = step.extra == SET ? sum : step.extra == PLUS ? *at + sum : *at * sum;
    };
    Whole whole(pass.room, rows, inputs);
    if (step.c == FULL)
        multiply(pass.registers[step.from], inputs, rows, (const float *)step.p, inputs, first, last, take);
    else if (step.c == BRAIN)
        multiply((const bf16 *)pass.room, inputs, rows, (const bf16 *)step.p, inputs, first, last, take);
    else if (step.c == BYTE)
        multiply_codes<8>(whole, rows, bytes, step.q, outputs, first / 16, end, take);
    else
        multiply_codes<4>(whole, rows, bytes, step.q, outputs, first / 16, end, take);
    for (long row = 0; step.d && row < rows; row++) activate(y + row * outputs + first, last - first, step.d);
}

static void rotate(const Step &step, const Pass &pass, long row) {
    // a: heads; b: their width; c: entries turned; d: pairs are neighbours; e: magnitude; p: frequencies
    float cosine[1024], sine[1024];
    rotate(pass.registers[step.from] + row * step.a * step.b, step.a, step.b, step.c, step.d, (float)step.e,
           (const float *)step.p, pass.positions[row], cosine, sine);
}

static void append(const Step &step, const Pass &pass, long row) {
    // from, to: registers of keys and values; a: heads; b: their width; c: which cache
    const Cache &cache = pass.caches[step.c];
    long batch = row / pass.time, slot = pass.starts[batch] + row % pass.time;
    for (int which = 0; which < 2; which++) {
        const float *x = pass.registers[which ? step.to : step.from] + row * step.a * step.b;
        void *base = which ? cache.values : cache.keys;
        for (long head = 0; head < step.a; head++, x += step.b) {
            long at = batch * cache.row + head * cache.head + slot * cache.slot;
            if (cache.narrow)
                for (long i = 0; i < step.b; i++) ((bf16 *)base)[at + i] = narrow(x[i]);
            else
                memcpy((float *)base + at, x, step.b * sizeof(float));
        }
    }
}

constexpr long MANY = 8;  // queries of a row and key head that are looked at together

static long tiles_of(const Step &step, const Pass &pass) { return (pass.time * (step.a / step.b) + MANY - 1) / MANY; }

static void attend(const Step &step, const Pass &pass, long piece) {
    // a: heads; b: key heads; c: which cache; d: a head's width; extra: which sight; e: scale; f: cap
    static thread_local std::vector<Query> queries;
    static thread_local std::vector<float> room;
    const Cache &cache = pass.caches[step.c];
    long shared = step.a / step.b, each = pass.time * shared, width = step.a * step.d;
    // The longest first.
    long tile = tiles_of(step, pass) - 1 - piece / (pass.batch * step.b), row = piece / step.b % pass.batch;
    long group = piece % step.b, first = tile * MANY, count = std::min(MANY, each - first);
    long slots = cache.slots == FILLED ? pass.filled : cache.slots;
    queries.resize(count);
    for (long i = 0; i < count; i++) {
        long time = (first + i) / shared, head = group * shared + (first + i) % shared, at = row * pass.time + time;
        queries[i].vector = pass.registers[step.from] + at * width + head * step.d;
        queries[i].result = pass.registers[step.to] + at * width + head * step.d;
        look(queries[i], pass.sights[step.extra], slots, row, head, time, pass.positions[at]);
    }
    long from = row * cache.row + group * cache.head;
    float scale = (float)step.e, cap = (float)step.f;
    if (cache.narrow) {
        const bf16 *keys = (const bf16 *)cache.keys + from, *values = (const bf16 *)cache.values + from;
        attend(queries, keys, values, cache.slot, step.d, scale, cap, room);
    } else {
        const float *keys = (const float *)cache.keys + from, *values = (const float *)cache.values + from;
        attend(queries, keys, values, cache.slot, step.d, scale, cap, room);
    }
}

static void elementwise(const Step &step, const Pass &pass, long row) {
    // a: width; e: y = e · x, or for CAP y = e · tanh(x / e)
    const float *x = pass.registers[step.from] + row * step.a;
    float *y = pass.registers[step.to] + row * step.a, given = (float)step.e;
    by_sixteen(step.a, [&](long i, long n) {
        v16 value = take(x, i, n);
        if (step.kind == SCALE) value = value * given;
        if (step.kind == CAP) value = hyperbolic_tangent(value / given) * given;
        put(y, i, n, step.kind == ADD ? take(y, i, n) + value : value);
    });
}

static long pieces_of(const Step &step, const Pass &pass) {
    switch (step.kind) {
    case LINEAR: return (step.b + outputs_each(step, pass) - 1) / outputs_each(step, pass);
    case ATTEND: return pass.batch * step.b * tiles_of(step, pass);
    default: return Share(rows_of(pass) * (step.kind == NORM ? step.b : 1), pass).pieces;
    }
}

static void do_piece(const Step &step, const Pass &pass, long piece) {
    if (step.kind == LINEAR) return linear(step, pass, piece);
    if (step.kind == ATTEND) return attend(step, pass, piece);
    Share share(rows_of(pass) * (step.kind == NORM ? step.b : 1), pass);
    for (long row = share.first(piece); row < share.first(piece + 1); row++) switch (step.kind) {
        case NORM: norm(step, pass, row); break;
        case NARROW: narrow(step, pass, row); break;
        case ROTATE: rotate(step, pass, row); break;
        case APPEND: append(step, pass, row); break;
        default: elementwise(step, pass, row);
        }
}

static inline void breathe(long &spins) {
    if (++spins > 2000) {
        sched_yield();
    } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
}

extern "C" void formery_weights(const uint8_t *codes, const void *scales, long bits, long inputs, const int64_t *outputs,
                                long count, float *y) {
    for (long i = 0; i < count; i++, y += inputs)
        bits == 8 ? weights_of<8>(codes, scales, inputs, outputs[i], y) : weights_of<4>(codes, scales, inputs, outputs[i], y);
}

extern "C" long formery_room(long rows, long inputs) { return std::max<long>(rows * inputs * 2, Whole::bytes(rows, inputs)); }

extern "C" void formery_run(const Step *steps, long count, const Pass *pass) {
    // The step in the upper half of `next`, in the lower half its next piece; `done`: pieces of the step that are over.
    alignas(64) std::atomic<uint64_t> next{0};
    alignas(64) std::atomic<long> done{0};
    double before = omp_get_wtime();
    std::vector<long> pieces(count);
    for (long i = 0; i < count; i++) pieces[i] = pieces_of(steps[i], *pass);
#pragma omp parallel num_threads((int)pass->threads)
    for (long spins = 0;;) {
        uint64_t ticket = next.fetch_add(1, std::memory_order_acq_rel);
        long at = (long)(ticket >> 32), piece = (long)(ticket & 0xffffffff);
        if (at >= count) break;
        if (piece >= pieces[at]) {
            while ((long)(next.load(std::memory_order_acquire) >> 32) == at) breathe(spins);
            continue;
        }
        spins = 0;
        do_piece(steps[at], *pass, piece);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces[at]) {
            if (pass->seconds) {
                double now = omp_get_wtime();
                pass->seconds[at] += now - before, before = now;
            }
            done.store(0, std::memory_order_relaxed);
            next.store((uint64_t)(at + 1) << 32, std::memory_order_release);
        }
    }
}
