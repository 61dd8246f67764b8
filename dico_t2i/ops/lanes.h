/* What the operators in C share: vectors of LANES floats, and exp on them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

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

inlined vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return chosen(a > b, a, b);
#endif
}

/* The same of each lane; of what is below -60 that of -60, so that products with it do not become denormal and slow. */
inlined vec exp_lanes(vec v) {
    v = larger(v, (vec){0} - 60.0f);
    vec n = v * 1.44269504f + 12582912.0f;
    const ivec power = ((ivec)n + 127) << 23;
    n -= 12582912.0f;
    const vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    const vec e = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f
                  + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    return e * (vec)power;
}
