/* The network's operators on the CPU, on contiguous float32 tensors (N, H, W, C), vectorised over channels.

   Convolutions work on one sample and LANES channels at a time, in a zero-padded copy (a tile) that stays in cache.
   Every sum has an order that depends on shapes alone: results do not depend on the number of threads.
   Vectors (a number for each sample and channel) are (N, C); pixels are the H * W of a sample. A NULL argument is
   a part that is not there. Functions return 0, or 1 when out of memory. */

#include "lanes.h"

#define PIXELS 8       /* outputs of a row that are computed together, in registers */
#define CHUNK 64       /* pixels that one task sums over */
#define MAX_KERNEL 11  /* height and width of the largest text kernel */
#define MAX_TAPS (MAX_KERNEL * MAX_KERNEL)

/* Normal distribution and density at x. 1 - cdf(t) = exp(-t^2 / 2) times a polynomial in 1 / (1 + 0.21 t) for t >= 0,
   fitted to a relative error of 2e-8. */
inlined void normal(float x, float *cdf, float *density) {
    float t = fabsf(x), u = 1.0f / (1.0f + 0.21f * t), e = exp_negative(-0.5f * t * t);
    float p = u * (8.37115743e-2f + u * (8.50688791e-2f + u * (6.91920264e-2f + u * (1.24873262e-1f
              + u * (-9.39263995e-2f + u * (3.49402640e-1f + u * (-3.30254714e-1f + u * (2.83589155e-1f
              + u * -7.16564161e-2f))))))));
    float tail = p * e;
    *cdf = x < 0 ? tail : 1.0f - tail;
    *density = 0.398942280f * e;
}

inlined float gelu(float x) {
    float cdf, density;
    normal(x, &cdf, &density);
    return x * cdf;
}

inlined float gelu_slope(float x) {
    float cdf, density;
    normal(x, &cdf, &density);
    return cdf + x * density;
}

/* ---- LayerNorm over channels, with residual and gate before it, and scale and shift after it ---- */

/* A pixel minus its mean, times its inverse deviation, and with a and b times 1 + a, plus b. */
inlined void modulated(float *y, const float *x, float mean, float rstd, const float *a, const float *b, size C) {
    if (a) {
#pragma omp simd
        for (size c = 0; c < C; c++) y[c] = (x[c] - mean) * rstd * (1.0f + a[c]) + b[c];
    } else {
#pragma omp simd
        for (size c = 0; c < C; c++) y[c] = (x[c] - mean) * rstd;
    }
}

/* residual = x + gate * branch; out = LayerNorm(residual) * (1 + scale) + shift. */
int norm_forward(const float *x, const float *branch, const float *gate, const float *shift, const float *scale,
                 float *residual, float *out, float *mean, float *rstd, size N, size pixels, size C, float eps,
                 size threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size p = 0; p < N * pixels; p++) {
        const size n = p / pixels;
        const float *row = x + p * C;
        float *y = out + p * C, sum = 0, squares = 0;
        if (branch) {
            const float *b = branch + p * C, *g = gate ? gate + n * C : NULL;
            float *r = residual + p * C;
            if (g) {
#pragma omp simd reduction(+ : sum)
                for (size c = 0; c < C; c++) sum += r[c] = row[c] + g[c] * b[c];
            } else {
#pragma omp simd reduction(+ : sum)
                for (size c = 0; c < C; c++) sum += r[c] = row[c] + b[c];
            }
            row = r;
        } else {
#pragma omp simd reduction(+ : sum)
            for (size c = 0; c < C; c++) sum += row[c];
        }
        const float m = sum / C;
#pragma omp simd reduction(+ : squares)
        for (size c = 0; c < C; c++) squares += (row[c] - m) * (row[c] - m);
        const float s = 1.0f / sqrtf(squares / C + eps);
        mean[p] = m, rstd[p] = s;
        modulated(y, row, m, s, scale ? scale + n * C : NULL, shift ? shift + n * C : NULL, C);
    }
    return 0;
}

/* Add the chunks in their order: sums (N, chunks, C) -> out (N, C). */
static void add_chunks(const float *sums, float *out, size N, size chunks, size C, size threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size n = 0; n < N; n++)
        for (size k = 0; k < chunks; k++) {
            const float *s = sums + (n * chunks + k) * C;
            float *o = out + n * C;
#pragma omp simd
            for (size c = 0; c < C; c++) o[c] = k ? o[c] + s[c] : s[c];
        }
}

/* Gradients of norm_forward. source is x with a gate, and else the residual. grad_residual, the gradient of the first
   output, may be NULL; so may branch, gate and scale together with their gradients. Without a gate the gradient of the
   branch is grad_x. grad_sum (N, C) is the sum of grad_x over pixels, which is there with a gate. out is what
   norm_forward made, or NULL. */
int norm_backward(const float *source, const float *mean, const float *rstd, const float *shift, const float *scale,
                  const float *branch, const float *gate, const float *grad_residual, const float *grad_out,
                  float *grad_x, float *grad_branch, float *grad_gate, float *grad_sum, float *grad_shift,
                  float *grad_scale, float *out, size N, size pixels, size C, size threads) {
    const size chunks = (pixels + CHUNK - 1) / CHUNK, count = N * chunks * C;
    float *gate_sums = gate ? take(2 * count, 4) : NULL, *shift_sums = scale ? take(2 * count, 4) : NULL;
    float *grad_sums = gate_sums ? gate_sums + count : NULL;
    float *scale_sums = scale && shift_sums ? shift_sums + count : NULL;
    const int failed = (gate && !gate_sums) || (scale && !shift_sums);
    if (!failed) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (size task = 0; task < N * chunks; task++) {
            const size n = task / chunks, first = task % chunks * CHUNK, last = smaller(first + CHUNK, pixels);
            const float *a = scale ? scale + n * C : NULL;
            float *gs = gate ? gate_sums + task * C : NULL, *xs = gate ? grad_sums + task * C : NULL;
            float *hs = scale ? shift_sums + task * C : NULL, *ss = scale ? scale_sums + task * C : NULL;
            if (gs) memset(gs, 0, C * 4), memset(xs, 0, C * 4);
            if (hs) memset(hs, 0, C * 4), memset(ss, 0, C * 4);
            for (size p = n * pixels + first; p < n * pixels + last; p++) {
                const float *r = source + p * C, *go = grad_out + p * C, m = mean[p], s = rstd[p];
                float *gx = grad_x + p * C, *gb = gate ? grad_branch + p * C : NULL, sum = 0, dot = 0;
                if (gate) {
                    const float *b = branch + p * C, *g = gate + n * C;
#pragma omp simd
                    for (size c = 0; c < C; c++) gb[c] = r[c] + g[c] * b[c];
                    r = gb; /* the residual, until the gradient of the branch takes its place */
                }
                if (a) {
#pragma omp simd reduction(+ : sum, dot)
                    for (size c = 0; c < C; c++) {
                        const float g = go[c], h = (r[c] - m) * s, scaled = g * (1.0f + a[c]);
                        hs[c] += g;
                        ss[c] += g * h;
                        sum += scaled;
                        dot += scaled * h;
                    }
                } else {
#pragma omp simd reduction(+ : sum, dot)
                    for (size c = 0; c < C; c++) {
                        sum += go[c];
                        dot += go[c] * ((r[c] - m) * s);
                    }
                }
                sum /= C, dot /= C;
                if (a) {
#pragma omp simd
                    for (size c = 0; c < C; c++)
                        gx[c] = s * (go[c] * (1.0f + a[c]) - sum - (r[c] - m) * s * dot);
                } else {
#pragma omp simd
                    for (size c = 0; c < C; c++) gx[c] = s * (go[c] - sum - (r[c] - m) * s * dot);
                }
                if (grad_residual) {
                    const float *gr = grad_residual + p * C;
#pragma omp simd
                    for (size c = 0; c < C; c++) gx[c] += gr[c];
                }
                if (out) modulated(out + p * C, r, m, s, a, shift ? shift + n * C : NULL, C);
                if (gate) {
                    const float *b = branch + p * C, *g = gate + n * C;
#pragma omp simd
                    for (size c = 0; c < C; c++) {
                        gb[c] = gx[c] * g[c];
                        gs[c] += gx[c] * b[c];
                        xs[c] += gx[c];
                    }
                }
            }
        }
        if (gate) {
            add_chunks(gate_sums, grad_gate, N, chunks, C, threads);
            add_chunks(grad_sums, grad_sum, N, chunks, C, threads);
        }
        if (scale) {
            add_chunks(shift_sums, grad_shift, N, chunks, C, threads);
            add_chunks(scale_sums, grad_scale, N, chunks, C, threads);
        }
    }
    free(gate_sums);
    free(shift_sums);
    return failed;
}

/* ---- a factor for each sample and channel ---- */

/* out = base + x * scale. */
int scale_forward(const float *x, const float *scale, const float *base, float *out, size N, size pixels, size C,
                  size threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size p = 0; p < N * pixels; p++) {
        const float *row = x + p * C, *s = scale + p / pixels * C, *b = base ? base + p * C : NULL;
        float *y = out + p * C;
        if (b) {
#pragma omp simd
            for (size c = 0; c < C; c++) y[c] = b[c] + row[c] * s[c];
        } else {
#pragma omp simd
            for (size c = 0; c < C; c++) y[c] = row[c] * s[c];
        }
    }
    return 0;
}

/* grad_sum (N, C) is the sum of grad over pixels. */
int scale_backward(const float *x, const float *scale, const float *grad, float *grad_x, float *grad_scale,
                   float *grad_sum, size N, size pixels, size C, size threads) {
    const size chunks = (pixels + CHUNK - 1) / CHUNK, count = N * chunks * C;
    float *sums = take(2 * count, 4);
    if (!sums) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size task = 0; task < N * chunks; task++) {
        const size n = task / chunks, first = task % chunks * CHUNK, last = smaller(first + CHUNK, pixels);
        const float *s = scale + n * C;
        float *total = sums + task * C, *plain = sums + count + task * C;
        memset(total, 0, C * 4), memset(plain, 0, C * 4);
        for (size p = n * pixels + first; p < n * pixels + last; p++) {
            const float *row = x + p * C, *g = grad + p * C;
            float *gx = grad_x + p * C;
#pragma omp simd
            for (size c = 0; c < C; c++) {
                gx[c] = g[c] * s[c];
                total[c] += g[c] * row[c];
                plain[c] += g[c];
            }
        }
    }
    add_chunks(sums, grad_scale, N, chunks, C, threads);
    add_chunks(sums + count, grad_sum, N, chunks, C, threads);
    free(sums);
    return 0;
}

/* ---- GELU ---- */

/* The gradient of GELU's input x, its sum over pixels (C), and GELU of x again. */
int gelu_backward(const float *x, const float *grad, float *grad_x, float *grad_sum, float *out, size pixels, size C,
                  size threads) {
    const size chunks = (pixels + CHUNK - 1) / CHUNK;
    float *sums = take(chunks * C, 4);
    if (!sums) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size task = 0; task < chunks; task++) {
        float *total = sums + task * C;
        memset(total, 0, C * 4);
        for (size p = task * CHUNK; p < smaller((task + 1) * CHUNK, pixels); p++) {
            const float *row = x + p * C, *g = grad + p * C;
            float *gx = grad_x + p * C, *y = out + p * C;
#pragma omp simd
            for (size c = 0; c < C; c++) {
                float cdf, density;
                normal(row[c], &cdf, &density);
                y[c] = row[c] * cdf;
                gx[c] = g[c] * (cdf + row[c] * density);
                total[c] += gx[c];
            }
        }
    }
    add_chunks(sums, grad_sum, 1, chunks, C, threads);
    free(sums);
    return 0;
}

/* ---- depthwise convolutions ---- */

/* A row of a tile consists of `border` zero pixels, the row of the image, and zeros up to the stride. */
inlined size tile_stride(size W, size border) { return round_up(W, PIXELS) + 2 * border; }

static void load_tile(vec *tile, const float *x, size H, size W, size C, size c, size border) {
    const size stride = tile_stride(W, border), lanes = smaller(LANES, C - c);
    for (size h = 0; h < H; h++) {
        vec *row = tile + h * stride;
        memset(row, 0, border * sizeof(vec));
        memset(row + border + W, 0, (stride - border - W) * sizeof(vec));
        const float *source = x + h * W * C + c;
        if (lanes == LANES)
            for (size w = 0; w < W; w++) memcpy(row + border + w, source + w * C, sizeof(vec));
        else
            for (size w = 0; w < W; w++) {
                vec v = {0};
                memcpy(&v, source + w * C, lanes * 4);
                row[border + w] = v;
            }
    }
}

inlined void store(float *out, const vec *value, size lanes) {
    if (lanes == LANES)
        memcpy(out, value, sizeof(vec));
    else
        memcpy(out, value, lanes * 4);
}

inlined vec fetch(const float *from, size lanes) {
    vec value = {0};
    if (lanes == LANES)
        memcpy(&value, from, sizeof(vec));
    else
        memcpy(&value, from, lanes * 4);
    return value;
}

/* PIXELS outputs of row y, starting at column w: the sum over taps (K, K) of tap times shifted input. */
inlined void correlate(vec *out, const vec *tile, const vec *taps, size y, size w, size H, size stride, const int K) {
    vec sum[PIXELS] = {0};
    for (int i = 0; i < K; i++) {
        const size source = y + i - K / 2;
        if (source < 0 || source >= H) continue;
        const vec *row = tile + source * stride + w;
#pragma GCC unroll 11
        for (int j = 0; j < K; j++) {
            const vec tap = taps[i * K + j];
#pragma GCC unroll 8
            for (int p = 0; p < PIXELS; p++) sum[p] += row[p + j] * tap;
        }
    }
    for (int p = 0; p < PIXELS; p++) out[p] = sum[p];
}

/* Gradients of one row of taps, i: the sum over pixels of output gradient times shifted input. Both tiles have the
   same border. */
inlined void correlate_taps(vec *out, const vec *tile, const vec *grad, size i, size H, size W, size stride,
                            const int K) {
    vec sum[MAX_KERNEL] = {0};
    for (size y = 0; y < H; y++) {
        const size source = y + i - K / 2;
        if (source < 0 || source >= H) continue;
        for (size w = 0; w < W; w += PIXELS) {
            const vec *row = tile + source * stride + w, *g = grad + y * stride + w + K / 2;
#pragma GCC unroll 8
            for (int p = 0; p < PIXELS; p++)
#pragma GCC unroll 11
                for (int j = 0; j < K; j++) sum[j] += row[p + j] * g[p];
        }
    }
    for (int j = 0; j < K; j++) out[j] = sum[j];
}

/* Store the convolution of a tile, added to base if there is one, into channels [c, c + lanes) of out (H, W, C); the sum
   of the convolution. */
inlined vec correlate_all(float *out, const float *base, const vec *tile, const vec *taps, size H, size W, size C,
                          size lanes, const int K) {
    const size stride = tile_stride(W, K / 2);
    vec sums[PIXELS], total = {0};
    for (size y = 0; y < H; y++)
        for (size w = 0; w < W; w += PIXELS) {
            correlate(sums, tile, taps, y, w, H, stride, K);
            for (size p = 0; p < smaller(PIXELS, W - w); p++) {
                const size at = (y * W + w + p) * C;
                total += sums[p];
                if (base) sums[p] += fetch(base + at, lanes);
                store(out + at, sums + p, lanes);
            }
        }
    return total;
}

/* Make K a compile-time constant, so that the compiler keeps the sums in registers. */
static void correlate_text(float *out, const float *base, const vec *tile, const vec *taps, size H, size W, size C,
                           size lanes, size K) {
    switch (K) {
    case 3: correlate_all(out, base, tile, taps, H, W, C, lanes, 3); break;
    case 5: correlate_all(out, base, tile, taps, H, W, C, lanes, 5); break;
    case 7: correlate_all(out, base, tile, taps, H, W, C, lanes, 7); break;
    case 9: correlate_all(out, base, tile, taps, H, W, C, lanes, 9); break;
    case 11: correlate_all(out, base, tile, taps, H, W, C, lanes, 11); break;
    }
}

static void correlate_text_taps(vec *out, const vec *tile, const vec *grad, size H, size W, size stride, size K) {
    for (size i = 0; i < K; i++)
        switch (K) {
        case 3: correlate_taps(out + 3 * i, tile, grad, i, H, W, stride, 3); break;
        case 5: correlate_taps(out + 5 * i, tile, grad, i, H, W, stride, 5); break;
        case 7: correlate_taps(out + 7 * i, tile, grad, i, H, W, stride, 7); break;
        case 9: correlate_taps(out + 9 * i, tile, grad, i, H, W, stride, 9); break;
        case 11: correlate_taps(out + 11 * i, tile, grad, i, H, W, stride, 11); break;
        }
}

static void load_tokens(vec *taps, const float *context, size T, size C, size lanes, size count, int flipped) {
    for (size k = 0; k < count; k++) {
        vec v = {0};
        memcpy(&v, context + smaller(k, T - 1) * C, lanes * 4);
        taps[flipped ? count - 1 - k : k] = v;
    }
}

/* context (N, T, C): token k is tap k of the K x K kernels; the last token is repeated for all later taps. K is 3,
   5, 7, 9 or 11. base (N, H, W, C) is added, if it is there. */
int text_forward(const float *x, const float *context, const float *base, float *out, size N, size H, size W, size C, size T, size K,
                 size threads) {
    const size groups = (C + LANES - 1) / LANES, area = H * tile_stride(W, K / 2);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *tile = take(area, sizeof(vec)), taps[MAX_TAPS];
        failed |= !tile;
#pragma omp for schedule(static)
        for (size task = 0; task < N * groups; task++) {
            const size n = task / groups, c = task % groups * LANES, lanes = smaller(LANES, C - c);
            if (!tile) continue;
            load_tile(tile, x + n * H * W * C, H, W, C, c, K / 2);
            load_tokens(taps, context + n * T * C + c, T, C, lanes, K * K, 0);
            const size start = n * H * W * C + c;
            correlate_text(out + start, base ? base + start : NULL, tile, taps, H, W, C, lanes, K);
        }
        free(tile);
    }
    return failed;
}

/* Either gradient may be NULL. */
int text_backward(const float *x, const float *context, const float *grad, float *grad_x, float *grad_context, size N,
                  size H, size W, size C, size T, size K, size threads) {
    const size groups = (C + LANES - 1) / LANES, stride = tile_stride(W, K / 2), area = H * stride;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *tile = take(2 * area, sizeof(vec)), *grad_tile = tile + area, taps[MAX_TAPS];
        failed |= !tile;
#pragma omp for schedule(static)
        for (size task = 0; task < N * groups; task++) {
            const size n = task / groups, c = task % groups * LANES, lanes = smaller(LANES, C - c);
            const size sample = n * H * W * C, tokens = n * T * C + c;
            if (!tile) continue;
            load_tile(grad_tile, grad + sample, H, W, C, c, K / 2);
            if (grad_x) {
                load_tokens(taps, context + tokens, T, C, lanes, K * K, 1);
                correlate_text(grad_x + sample + c, NULL, grad_tile, taps, H, W, C, lanes, K);
            }
            if (grad_context) {
                load_tile(tile, x + sample, H, W, C, c, K / 2);
                correlate_text_taps(taps, tile, grad_tile, H, W, stride, K);
                for (size k = T; k < K * K; k++) taps[T - 1] += taps[k];
                for (size k = 0; k < T; k++) store(grad_context + tokens + k * C, taps + k, lanes);
            }
        }
        free(tile);
    }
    return failed;
}

/* Load channels [c, c + lanes) of weight (C, 3, 3) and bias (C). */
static void load_weight(vec *taps, vec *offset, const float *weight, const float *bias, size c, size lanes) {
    *offset = (vec){0};
    memcpy(offset, bias + c, lanes * 4);
    for (size k = 0; k < 9; k++) {
        taps[k] = (vec){0};
        for (size l = 0; l < lanes; l++) taps[k][l] = weight[(c + l) * 9 + k];
    }
}

/* out = gelu(convolution of x + bias); mean (N, C) is the mean of out over pixels. */
int depthwise_forward(const float *x, const float *weight, const float *bias, float *out, float *mean, size N, size H,
                      size W, size C, size threads) {
    const size groups = (C + LANES - 1) / LANES, stride = tile_stride(W, 1);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *tile = take(H * stride, sizeof(vec)), taps[9], offset, sums[PIXELS];
        failed |= !tile;
#pragma omp for schedule(static)
        for (size task = 0; task < N * groups; task++) {
            const size n = task / groups, c = task % groups * LANES, lanes = smaller(LANES, C - c);
            if (!tile) continue;
            load_tile(tile, x + n * H * W * C, H, W, C, c, 1);
            load_weight(taps, &offset, weight, bias, c, lanes);
            vec total = {0};
            for (size y = 0; y < H; y++)
                for (size w = 0; w < W; w += PIXELS) {
                    correlate(sums, tile, taps, y, w, H, stride, 3);
                    const size used = smaller(PIXELS, W - w);
                    for (size p = 0; p < PIXELS; p++) sums[p] += offset;
                    float *flat = (float *)sums;
#pragma omp simd
                    for (size k = 0; k < PIXELS * LANES; k++) flat[k] = gelu(flat[k]);
                    for (size p = 0; p < used; p++) {
                        total += sums[p];
                        store(out + ((n * H + y) * W + w + p) * C + c, sums + p, lanes);
                    }
                }
            total /= (float)(H * W);
            store(mean + n * C + c, &total, lanes);
        }
        free(tile);
    }
    return failed;
}

/* Gradients of depthwise_forward; the input of GELU is computed again. sums (N, 11, C) holds the gradients of the nine
   taps and of the bias for each sample, and the sum of grad_x over pixels. */
int depthwise_backward(const float *x, const float *weight, const float *bias, const float *grad,
                       const float *grad_mean, float *grad_x, float *sums, size N, size H, size W, size C,
                       size threads) {
    const size groups = (C + LANES - 1) / LANES, stride = tile_stride(W, 1), area = H * stride;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *tile = take(2 * area, sizeof(vec)), *slopes = tile + area, taps[9], flipped[9], offset;
        failed |= !tile;
#pragma omp for schedule(static)
        for (size task = 0; task < N * groups; task++) {
            const size n = task / groups, c = task % groups * LANES, lanes = smaller(LANES, C - c);
            const size sample = n * H * W * C;
            if (!tile) continue;
            load_tile(tile, x + sample, H, W, C, c, 1);
            load_tile(slopes, grad + sample, H, W, C, c, 1);
            load_weight(taps, &offset, weight, bias, c, lanes);
            for (size k = 0; k < 9; k++) flipped[k] = taps[8 - k];
            vec pooled = {0}, total = {0}, before[PIXELS];
            memcpy(&pooled, grad_mean + n * C + c, lanes * 4);
            pooled /= (float)(H * W);
            for (size y = 0; y < H; y++)
                for (size w = 0; w < W; w += PIXELS) {
                    vec *g = slopes + y * stride + w + 1;
                    correlate(before, tile, taps, y, w, H, stride, 3);
                    for (size p = 0; p < PIXELS; p++) before[p] += offset;
                    float *flat = (float *)before;
#pragma omp simd
                    for (size k = 0; k < PIXELS * LANES; k++) flat[k] = gelu_slope(flat[k]);
                    for (size p = 0; p < smaller(PIXELS, W - w); p++) {
                        g[p] = (g[p] + pooled) * before[p];
                        total += g[p];
                    }
                }
            const vec passed = correlate_all(grad_x + sample + c, NULL, slopes, flipped, H, W, C, lanes, 3);
            for (size i = 0; i < 3; i++) correlate_taps(taps + 3 * i, tile, slopes, i, H, W, stride, 3);
            for (size k = 0; k < 9; k++) store(sums + (n * 11 + k) * C + c, taps + k, lanes);
            store(sums + (n * 11 + 9) * C + c, &total, lanes);
            store(sums + (n * 11 + 10) * C + c, &passed, lanes);
        }
        free(tile);
    }
    return failed;
}
