/* What the operators in C share: vectors of LANES floats, and exp on them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define inlined static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int64_t size;

inlined size smaller(size a, size b) { return a < b ? a : b; }
inlined size round_up(size n, size unit) { return (n + unit - 1) / unit * unit; }

inlined void *take(size count, size bytes) { return aligned_alloc(64, round_up(count * bytes, 64)); }

/* exp(v) of v <= 0, to 2e-7; 0 below -87. */
inlined float exp_negative(float v) {
    v = v < -87.0f ? -87.5f : v;
    float n = v * 1.44269504f + 12582912.0f; /* the integer part, in the lowest bits */
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
              + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    int32_t power = (bits + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return e * scale;
}

inlined vec chosen(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* The same of each lane; exactly 0 below -80, so that no product with it is a slow denormal number. */
inlined vec exp_lanes(vec v) {
    const vec zero = {0};
    const ivec tiny = v < zero - 80.0f;
    v = chosen(tiny, zero, v);
    vec n = v * 1.44269504f + 12582912.0f;
    const ivec power = ((ivec)n + 127) << 23;
    n -= 12582912.0f;
    const vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    const vec e = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
                  + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    return chosen(tiny, zero, e * (vec)power);
}
