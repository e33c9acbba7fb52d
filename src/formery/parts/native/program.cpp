// A list of steps over rows of numbers: one call runs a whole stack of layers.
#include <omp.h>

#include "attention.h"
#include "codes.h"
#include "linear.h"
#include "rows.h"

enum Kind { COPY, ADD, NORM, NARROW, LINEAR, ROTATE, APPEND, ATTEND, CAP };
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
    int64_t batch, time, threads;
    const int64_t *positions, *starts;  // of each token; the slot of each row's first token
    float **registers;
    void *room;  // for inputs in the form that narrow weights want
    Cache *caches;
    const Seen *sights;
    double *seconds;  // for each step, or null
};

static void norm(const Step &step, const Pass &pass) {
    // a: width; b: how many lie in a row; c: 1 for RMS; e: epsilon; f: offset; p: weight; q: shift
    long rows = pass.batch * pass.time * step.b;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = pass.registers[step.from] + row * step.a;
        float *y = pass.registers[step.to] + row * step.a;
        if (step.c)
            rms_norm(x, y, step.a, (float)step.e, (const float *)step.p, (float)step.f);
        else
            layer_norm(x, y, step.a, (float)step.e, (const float *)step.p, (const float *)step.q);
    }
}

static void narrow(const Step &step, const Pass &pass) {
    // a: inputs; c: for which store
    long rows = pass.batch * pass.time;
    Whole whole(pass.room, rows, step.a);
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = pass.registers[step.from] + row * step.a;
        if (step.c == BRAIN)
            for (long i = 0; i < step.a; i++) ((bf16 *)pass.room)[row * step.a + i] = narrow(x[i]);
        else
            whole.take(x, row, step.a);
    }
}

static void linear(const Step &step, const Pass &pass) {
    // a: inputs; b: outputs; c: store; d: activation; extra: into; p: weights; q: their scales; r: bias
    long rows = pass.batch * pass.time, inputs = step.a, outputs = step.b;
    long chunk = std::clamp<long>(outputs / (pass.threads * 8) / 16 * 16, 16, 256), chunks = (outputs + chunk - 1) / chunk;
    float *y = pass.registers[step.to];
    const float *bias = (const float *)step.r;
    auto take = [&](long row, long o, float sum) {
        float *at = y + row * outputs + o;
        if (bias) sum += bias[o];
        *at = step.extra == SET ? sum : step.extra == PLUS ? *at + sum : *at * sum;
    };
    Whole whole(pass.room, rows, inputs);
#pragma omp for schedule(dynamic, 1)
    for (long part = 0; part < chunks; part++) {
        long first = part * chunk, last = std::min(outputs, first + chunk), end = (last + 15) / 16;
        const uint8_t *bytes = (const uint8_t *)step.p;
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
}

static void rotate(const Step &step, const Pass &pass) {
    // a: heads; b: their width; c: entries turned; d: pairs are neighbours; e: magnitude; p: frequencies
    long rows = pass.batch * pass.time;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        float cosine[1024], sine[1024];
        rotate(pass.registers[step.from] + row * step.a * step.b, step.a, step.b, step.c, step.d, (float)step.e,
               (const float *)step.p, pass.positions[row], cosine, sine);
    }
}

static void append(const Step &step, const Pass &pass) {
    // from, to: registers of keys and values; a: heads; b: their width; c: which cache
    const Cache &cache = pass.caches[step.c];
    long rows = pass.batch * pass.time, width = step.a * step.b;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        long batch = row / pass.time, slot = pass.starts[batch] + row % pass.time;
        for (int which = 0; which < 2; which++) {
            const float *x = pass.registers[which ? step.to : step.from] + row * width;
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
}

static void attend(const Step &step, const Pass &pass) {
    // a: heads; b: key heads; c: which cache; d: a head's width; extra: which sight; e: scale; f: cap
    constexpr long MANY = 8;
    const Cache &cache = pass.caches[step.c];
    long shared = step.a / step.b, each = pass.time * shared, tiles = (each + MANY - 1) / MANY, width = step.a * step.d;
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < pass.batch * step.b * tiles; item++) {
        static thread_local std::vector<Query> queries;
        static thread_local std::vector<float> room;
        // The longest first.
        long tile = tiles - 1 - item / (pass.batch * step.b), row = item / step.b % pass.batch, group = item % step.b;
        long first = tile * MANY, count = std::min(MANY, each - first);
        queries.resize(count);
        for (long i = 0; i < count; i++) {
            long time = (first + i) / shared, head = group * shared + (first + i) % shared, at = row * pass.time + time;
            queries[i].vector = pass.registers[step.from] + at * width + head * step.d;
            queries[i].result = pass.registers[step.to] + at * width + head * step.d;
            look(queries[i], pass.sights[step.extra], cache, row, head, time, pass.positions[at]);
        }
        long from = row * cache.row + group * cache.head;
        if (cache.narrow)
            attend(queries, (const bf16 *)cache.keys + from, (const bf16 *)cache.values + from, cache.slot, step.d,
                   (float)step.e, (float)step.f, room);
        else
            attend(queries, (const float *)cache.keys + from, (const float *)cache.values + from, cache.slot, step.d,
                   (float)step.e, (float)step.f, room);
    }
}

static void cap(const Step &step, const Pass &pass) {
    // a: width; e: y = e · tanh(x / e)
    long rows = pass.batch * pass.time;
    float most = (float)step.e;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = pass.registers[step.from] + row * step.a;
        float *y = pass.registers[step.to] + row * step.a;
        by_sixteen(step.a, [&](long i, long n) { put(y, i, n, hyperbolic_tangent(take(x, i, n) / most) * most); });
    }
}

static void elementwise(const Step &step, const Pass &pass) {
    // a: width
    long rows = pass.batch * pass.time;
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *x = pass.registers[step.from] + row * step.a;
        float *y = pass.registers[step.to] + row * step.a;
        for (long i = 0; i < step.a; i++) y[i] = step.kind == ADD ? y[i] + x[i] : x[i];
    }
}

extern "C" long formery_room(long rows, long inputs) { return std::max<long>(rows * inputs * 2, Whole::bytes(rows, inputs)); }

extern "C" void formery_run(const Step *steps, long count, const Pass *pass) {
    double before = omp_get_wtime();
#pragma omp parallel num_threads((int)pass->threads)
    for (long i = 0; i < count; i++) {
        const Step &step = steps[i];
        switch (step.kind) {
        case NORM: norm(step, *pass); break;
        case NARROW: narrow(step, *pass); break;
        case LINEAR: linear(step, *pass); break;
        case ROTATE: rotate(step, *pass); break;
        case APPEND: append(step, *pass); break;
        case CAP: cap(step, *pass); break;
        case ATTEND: attend(step, *pass); break;
        default: elementwise(step, *pass);
        }
        if (pass->seconds && omp_get_thread_num() == 0) {
            double now = omp_get_wtime();
            pass->seconds[i] += now - before, before = now;
        }
    }
}
