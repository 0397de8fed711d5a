/* Distances between vectors, and their gradients, pair by pair; fedsim/models/compiled.py compiles and calls this.

   Sums over a vector run in 16 lanes, sums over pairs in the order of the pairs. Nothing is reordered or fused
   (-ffp-contract=off, no -ffast-math), so the bits are the same whatever vector instructions the machine has.

   Norms, with tables of rows of `dim` numbers: SIZES sums absolute values; MODULI sums the moduli of complex numbers,
   stored as all real parts, then all imaginary parts. A gradient is 0 where a difference is 0. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define TILE 128 /* rows that stay in the second-level cache while all queries are compared with them */
#define AHEAD 4  /* rows of a large table that are fetched before it is their turn */

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));
typedef int64_t count;

enum { SIZES, MODULI };

/* Beyond `num` lanes read as 0 and are not written; with `num` = LANES, a constant, both are one instruction. */
INLINE lanes load(const float *from, count num) {
    lanes value = {0};
    memcpy(&value, from, num * sizeof(float));
    return value;
}

INLINE void add(float *to, lanes value, count num) {
    value += load(to, num);
    memcpy(to, &value, num * sizeof(float));
}

INLINE lanes difference(const float *query, const float *row, count num) { return load(query, num) - load(row, num); }

INLINE lanes root(lanes value) {
    for (int i = 0; i < LANES; i++) value[i] = sqrtf(value[i]);
    return value;
}

INLINE float total(lanes value) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) value[i] += value[i + width];
    return value[0];
}

INLINE lanes sizes(const float *query, const float *row, count half, count num, int norm) {
    lanes re = difference(query, row, num);
    if (norm == SIZES) return (lanes)((bits)re & INT32_MAX);
    lanes im = difference(query + half, row + half, num);
    return root(re * re + im * im);
}

INLINE float measure(const float *query, const float *row, count dim, int norm) {
    count half = dim / 2, width = norm == SIZES ? dim : half, i = 0;
    lanes sum = {0};
    for (; i + LANES <= width; i += LANES) sum += sizes(query + i, row + i, half, LANES, norm);
    if (i < width) sum += sizes(query + i, row + i, half, width - i, norm);
    return total(sum);
}

INLINE void add_slopes(const float *query, const float *row, float grad, float *query_grad, float *row_grad, count half,
                       count num, int norm) {
    lanes re = difference(query, row, num), all = (lanes){0} + grad;
    if (norm == SIZES) {
        lanes slope = (lanes)(((bits)all ^ ((bits)re & INT32_MIN)) & (re != 0)); /* grad times the sign */
        add(query_grad, slope, num);
        add(row_grad, -slope, num);
        return;
    }
    lanes im = difference(query + half, row + half, num);
    lanes square = re * re + im * im, least = (lanes){0} + FLT_MIN; /* where squares underflow no slope exceeds 1 */
    bits above = square > least;
    lanes scale = all / root((lanes)(((bits)square & above) | ((bits)least & ~above)));
    re *= scale;
    im *= scale;
    add(query_grad, re, num);
    add(row_grad, -re, num);
    add(query_grad + half, im, num);
    add(row_grad + half, -im, num);
}

INLINE void slope(const float *query, const float *row, float grad, float *query_grad, float *row_grad, count dim,
                  int norm) {
    count half = dim / 2, width = norm == SIZES ? dim : half, i = 0;
    for (; i + LANES <= width; i += LANES)
        add_slopes(query + i, row + i, grad, query_grad + i, row_grad + i, half, LANES, norm);
    if (i < width) add_slopes(query + i, row + i, grad, query_grad + i, row_grad + i, half, width - i, norm);
}

INLINE void fetch(const float *row, count dim) {
    for (count i = 0; i < dim; i += LANES) __builtin_prefetch(row + i);
}

/* All pairs. query [num_tables, batch, dim], rows [num_tables, num, dim], distances and grad [num_tables, batch, num];
   gradients are added to. */

INLINE void measure_all(const float *query, const float *rows, float *distances, count num_tables, count batch,
                        count num, count dim, int norm) {
    for (count table = 0; table < num_tables; table++) {
        for (count tile = 0; tile < num; tile += TILE)
            for (count b = 0; b < batch; b++)
                for (count n = tile; n < num && n < tile + TILE; n++)
                    distances[b * num + n] = measure(query + b * dim, rows + n * dim, dim, norm);
        query += batch * dim, rows += num * dim, distances += batch * num;
    }
}

INLINE void slope_all(const float *query, const float *rows, const float *grad, float *query_grad, float *rows_grad,
                      count num_tables, count batch, count num, count dim, int norm) {
    for (count table = 0; table < num_tables; table++) {
        for (count tile = 0; tile < num; tile += TILE)
            for (count b = 0; b < batch; b++)
                for (count n = tile; n < num && n < tile + TILE; n++)
                    slope(query + b * dim, rows + n * dim, grad[b * num + n], query_grad + b * dim, rows_grad + n * dim,
                          dim, norm);
        query += batch * dim, rows += num * dim, grad += batch * num;
        query_grad += batch * dim, rows_grad += num * dim;
    }
}

/* Each query with its own rows. query [batch, dim], table [num_rows, dim], ids, distances and grad [batch, num]. */

INLINE void measure_rows(const float *query, const float *table, const int64_t *ids, float *distances, count batch,
                         count num, count dim, int norm) {
    for (count pair = 0; pair < batch * num; pair++) {
        if (pair + AHEAD < batch * num) fetch(table + ids[pair + AHEAD] * dim, dim);
        distances[pair] = measure(query + pair / num * dim, table + ids[pair] * dim, dim, norm);
    }
}

INLINE void slope_rows(const float *query, const float *table, const int64_t *ids, const float *grad, float *query_grad,
                       float *table_grad, count batch, count num, count dim, int norm) {
    for (count pair = 0; pair < batch * num; pair++) {
        if (pair + AHEAD < batch * num) {
            fetch(table + ids[pair + AHEAD] * dim, dim);
            fetch(table_grad + ids[pair + AHEAD] * dim, dim);
        }
        slope(query + pair / num * dim, table + ids[pair] * dim, grad[pair], query_grad + pair / num * dim,
              table_grad + ids[pair] * dim, dim, norm);
    }
}

/* What Python calls: each norm has loops of its own, without a branch inside. */

void fedsim_measure_all(const float *query, const float *rows, float *distances, count num_tables, count batch,
                        count num, count dim, int norm) {
    if (norm == SIZES)
        measure_all(query, rows, distances, num_tables, batch, num, dim, SIZES);
    else
        measure_all(query, rows, distances, num_tables, batch, num, dim, MODULI);
}

void fedsim_slope_all(const float *query, const float *rows, const float *grad, float *query_grad, float *rows_grad,
                      count num_tables, count batch, count num, count dim, int norm) {
    if (norm == SIZES)
        slope_all(query, rows, grad, query_grad, rows_grad, num_tables, batch, num, dim, SIZES);
    else
        slope_all(query, rows, grad, query_grad, rows_grad, num_tables, batch, num, dim, MODULI);
}

void fedsim_measure_rows(const float *query, const float *table, const int64_t *ids, float *distances, count batch,
                         count num, count dim, int norm) {
    if (norm == SIZES)
        measure_rows(query, table, ids, distances, batch, num, dim, SIZES);
    else
        measure_rows(query, table, ids, distances, batch, num, dim, MODULI);
}

void fedsim_slope_rows(const float *query, const float *table, const int64_t *ids, const float *grad, float *query_grad,
                       float *table_grad, count batch, count num, count dim, int norm) {
    if (norm == SIZES)
        slope_rows(query, table, ids, grad, query_grad, table_grad, batch, num, dim, SIZES);
    else
        slope_rows(query, table, ids, grad, query_grad, table_grad, batch, num, dim, MODULI);
}
