/* Recurrences along the tokens of a sequence, on contiguous float32 tensors: gated linear attention on (N, L, H, d), and
   the selective scan on (N, L, E).

   Both walk token by token with the state in registers or in the first cache: decays are products of factors of at most
   1, which cannot overflow however strong they are. Every sum has an order that depends on shapes alone. Functions
   return 0, or 1 when out of memory. */

#include "lanes.h"

#define ROWS LANES    /* of a state, held in registers */
#define SCAN_CHUNK 32 /* tokens from one stored state of the selective scan to the next */
#define BLOCK 128     /* channels whose gradients of B and C are summed before they are written */
#define GROUPS (BLOCK / LANES)

inlined vec load(const float *from, size lanes) {
    vec v = {0};
    if (lanes == LANES)
        memcpy(&v, from, sizeof(vec));
    else
        memcpy(&v, from, lanes * 4);
    return v;
}

inlined void store(float *to, vec v, size lanes) {
    if (lanes == LANES)
        memcpy(to, &v, sizeof(vec));
    else
        memcpy(to, &v, lanes * 4);
}

inlined float sum_lanes(vec v) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
}

/* ---- gated linear attention ---- */

/* Walk over the tokens with a state (rows, lanes):
     state *= decay ; out += state^T row_read ; state += row_write lane_write^T.
   out and lane_write are (L, lanes), row_read and row_write (L, rows), decay is of rows, or of lanes. */
inlined void walk(float *out, const float *decay, const float *row_read, const float *row_write,
                  const float *lane_write, float *state, size L, size rows, size lanes, int backwards,
                  const int decay_of_lanes) {
    const size stride = decay_of_lanes ? lanes : rows;
    for (size c = 0; c < lanes; c += LANES)
        for (size r = 0; r < rows; r += ROWS) {
            vec held[ROWS];
            for (int i = 0; i < ROWS; i++) held[i] = load(state + (r + i) * lanes + c, LANES);
            for (size step = 0; step < L; step++) {
                const size t = backwards ? L - 1 - step : step;
                const float *read = row_read + t * rows + r, *write = row_write + t * rows + r;
                const float *factor = decay + t * stride + (decay_of_lanes ? c : r);
                const vec added = load(lane_write + t * lanes + c, LANES);
                vec sums[4] = {load(out + t * lanes + c, LANES)}, factors = {0};
                if (decay_of_lanes) factors = load(factor, LANES);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++) {
                    held[i] *= decay_of_lanes ? factors : factor[i] - (vec){0};
                    sums[i % 4] += held[i] * read[i];
                    held[i] += added * write[i];
                }
                store(out + t * lanes + c, (sums[0] + sums[1]) + (sums[2] + sums[3]), LANES);
            }
            for (int i = 0; i < ROWS; i++) store(state + (r + i) * lanes + c, held[i], LANES);
        }
}

/* A head's vectors (L, width), which lie `stride` apart, times a factor -> (L, padded). */
static void load_head(float *to, const float *from, size L, size width, size padded, size stride, float factor) {
    for (size t = 0; t < L; t++) {
        for (size d = 0; d < width; d++) to[t * padded + d] = from[t * stride + d] * factor;
        memset(to + t * padded + width, 0, (padded - width) * 4);
    }
}

/* exp of a head's log gates; with `shift` each stands one token earlier, and the last one is 1. */
static void load_decays(float *to, const float *from, size L, size width, size padded, size stride, size shift) {
    load_head(to, from + shift * stride, L - shift, width, padded, stride, 1.0f);
    memset(to + (L - shift) * padded, 0, shift * padded * 4);
    for (size i = 0; i < L * padded; i += LANES) store(to + i, exp_lanes(load(to + i, LANES)), LANES);
}

inlined float dot(const float *a, const float *b, size count) {
    vec sum = {0};
    for (size i = 0; i < count; i += LANES) sum += load(a + i, LANES) * load(b + i, LANES);
    return sum_lanes(sum);
}

/* q, k, gates (N, L, H, K), v (N, L, H, V) -> out (N, L, H, V), state (N, H, K, V). */
int gla_forward(const float *q, const float *k, const float *v, const float *gates, float *out, float *state, size N,
                size L, size H, size K, size V, size threads) {
    const size KP = round_up(K, LANES), VP = round_up(V, LANES);
    const float scale = 1.0f / sqrtf((float)K);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = take(L * (3 * KP + 2 * VP) + KP * VP, 4);
        float *qs = memory, *ks = qs + L * KP, *decay = ks + L * KP, *vs = decay + L * KP, *os = vs + L * VP;
        float *held = os + L * VP;
        failed |= !memory;
#pragma omp for schedule(static)
        for (size task = 0; task < N * H; task++) {
            const size keys = (task / H * L * H + task % H) * K, values = (task / H * L * H + task % H) * V;
            if (!memory) continue;
            load_head(qs, q + keys, L, K, KP, H * K, scale);
            load_head(ks, k + keys, L, K, KP, H * K, 1.0f);
            load_head(vs, v + values, L, V, VP, H * V, 1.0f);
            load_decays(decay, gates + keys, L, K, KP, H * K, 0);
            memset(os, 0, (L * VP + KP * VP) * 4);
            walk(os, decay, qs, ks, vs, held, L, KP, VP, 0, 0);
            for (size t = 0; t < L; t++) {
                const float own = dot(qs + t * KP, ks + t * KP, KP);
                for (size d = 0; d < V; d++) out[values + t * H * V + d] = os[t * VP + d] + own * vs[t * VP + d];
            }
            for (size d = 0; d < K; d++) memcpy(state + (task * K + d) * V, held + d * VP, V * 4);
        }
        free(memory);
    }
    return failed;
}

/* Gradients of gla_forward; state is its second output, whose gradient may be NULL. What a token does to itself is
   added apart: no gate has a part in it, and in the gradient of the gates it would have to cancel. */
int gla_backward(const float *q, const float *k, const float *v, const float *gates, const float *state,
                 const float *grad, const float *grad_state, float *grad_q, float *grad_k, float *grad_v,
                 float *grad_gates, size N, size L, size H, size K, size V, size threads) {
    const size KP = round_up(K, LANES), VP = round_up(V, LANES);
    const float scale = 1.0f / sqrtf((float)K);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *memory = take(L * (6 * KP + 3 * VP) + KP * VP, 4);
        float *qs = memory, *ks = qs + L * KP, *decay = ks + L * KP, *later = decay + L * KP, *dq = later + L * KP;
        float *dk = dq + L * KP, *vs = dk + L * KP, *gs = vs + L * VP, *dv = gs + L * VP, *held = dv + L * VP;
        double *total = take(K, 8);
        failed |= !memory || !total;
#pragma omp for schedule(static)
        for (size task = 0; task < N * H; task++) {
            const size keys = (task / H * L * H + task % H) * K, values = (task / H * L * H + task % H) * V;
            const float *last = state + task * K * V, *grad_last = grad_state ? grad_state + task * K * V : NULL;
            if (!memory || !total) continue;
            load_head(qs, q + keys, L, K, KP, H * K, scale);
            load_head(ks, k + keys, L, K, KP, H * K, 1.0f);
            load_head(vs, v + values, L, V, VP, H * V, 1.0f);
            load_head(gs, grad + values, L, V, VP, H * V, 1.0f);
            load_decays(decay, gates + keys, L, K, KP, H * K, 0);
            load_decays(later, gates + keys, L, K, KP, H * K, 1);
            memset(dq, 0, 2 * L * KP * 4);
            memset(dv, 0, (L * VP + KP * VP) * 4);
            walk(dq, decay, gs, vs, ks, held, L, VP, KP, 0, 1);
            memset(held, 0, KP * VP * 4);
            for (size i = 0; grad_last && i < K * V; i++) held[i % V * KP + i / V] = grad_last[i];
            walk(dk, later, vs, gs, qs, held, L, VP, KP, 1, 1);
            memset(held, 0, KP * VP * 4);
            for (size i = 0; grad_last && i < K * V; i++) held[i / V * VP + i % V] = grad_last[i];
            walk(dv, later, ks, qs, gs, held, L, KP, VP, 1, 0);
            memset(total, 0, K * 8);
            for (size i = 0; grad_last && i < K * V; i++) total[i / V] += (double)last[i] * grad_last[i];
            for (size t = L - 1; t >= 0; t--) {
                const float value = dot(vs + t * VP, gs + t * VP, VP), own = dot(qs + t * KP, ks + t * KP, KP);
                for (size d = 0; d < K; d++) {
                    const size i = t * KP + d, o = keys + t * H * K + d;
                    total[d] += (double)qs[i] * dq[i] - (double)ks[i] * dk[i];
                    grad_gates[o] = total[d];
                    grad_q[o] = scale * (dq[i] + ks[i] * value);
                    grad_k[o] = dk[i] + qs[i] * value;
                }
                for (size d = 0; d < V; d++) grad_v[values + t * H * V + d] = dv[t * VP + d] + own * gs[t * VP + d];
            }
        }
        free(memory);
        free(total);
    }
    return failed;
}

/* ---- selective scan ---- */

/* log(1 + exp(x)) and its slope, the sigmoid; log1p by the series of 2 atanh(e / (2 + e)). */
inlined vec softplus(vec x, vec *slope) {
    const vec zero = {0};
    const ivec positive = x > zero;
    const vec e = exp_lanes(chosen(positive, -x, x)), s = e / (2.0f + e), q = s * s;
    const vec more = 2.0f * s * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9
                     + q * (1.0f / 11 + q * (1.0f / 13)))))));
    *slope = chosen(positive, zero + 1.0f, e) / (1.0f + e);
    return chosen(positive, x, zero) + more;
}

inlined vec sigmoid(vec x) {
    const vec zero = {0};
    const ivec positive = x > zero;
    const vec e = exp_lanes(chosen(positive, -x, x));
    return chosen(positive, zero + 1.0f, e) / (1.0f + e);
}

/* Channels [e, e + lanes) of A (n, E). */
static void load_rates(vec *rates, const float *A, size states, size E, size e, size lanes) {
    for (size n = 0; n < states; n++) rates[n] = load(A + n * E + e, lanes);
}

/* u, delta, z (N, L, E), A (n, E), B, C (N, L, n), D, bias (E) -> out (N, L, E) and the states before each chunk
   (N, chunks, n, E), in the order of the walk. */
int scan_forward(const float *u, const float *delta, const float *A, const float *B, const float *C, const float *D,
                 const float *z, const float *bias, float *out, float *kept, size N, size L, size E, size states,
                 size backwards, size threads) {
    const size groups = (E + LANES - 1) / LANES, chunks = (L + SCAN_CHUNK - 1) / SCAN_CHUNK;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *h = take(2 * states, sizeof(vec)), *rates = h + states;
        failed |= !h;
#pragma omp for schedule(static)
        for (size task = 0; task < N * groups; task++) {
            const size sample = task / groups, e = task % groups * LANES, lanes = smaller(LANES, E - e);
            if (!h) continue;
            const vec skip = load(D + e, lanes), offset = load(bias + e, lanes);
            load_rates(rates, A, states, E, e, lanes);
            memset(h, 0, states * sizeof(vec));
            for (size step = 0; step < L; step++) {
                const size token = sample * L + (backwards ? L - 1 - step : step), at = token * E + e;
                const float *b = B + token * states, *c = C + token * states;
                if (step % SCAN_CHUNK == 0) {
                    float *to = kept + (sample * chunks + step / SCAN_CHUNK) * states * E + e;
                    for (size n = 0; n < states; n++) store(to + n * E, h[n], lanes);
                }
                vec slope;
                const vec dt = softplus(load(delta + at, lanes) + offset, &slope), input = load(u + at, lanes);
                const vec x = dt * input, gate = load(z + at, lanes);
                vec y = skip * input;
                for (size n = 0; n < states; n++) {
                    h[n] = h[n] * exp_lanes(dt * rates[n]) + x * b[n];
                    y += h[n] * c[n];
                }
                store(out + at, y * gate * sigmoid(gate), lanes);
            }
        }
        free(h);
    }
    return failed;
}

/* What a chunk's tokens need on the way back, of one vector of channels. */
typedef struct {
    vec dt, slope, input, gate;
} Token;

/* Gradients of scan_forward. grad_B, grad_C: (N, blocks, L, n), of BLOCK channels each; grad_A: (N, n, E);
   grad_D, grad_bias: (N, E). */
int scan_backward(const float *u, const float *delta, const float *A, const float *B, const float *C, const float *D,
                  const float *z, const float *bias, const float *kept, const float *grad, float *grad_u,
                  float *grad_delta, float *grad_A, float *grad_B, float *grad_C, float *grad_D, float *grad_z,
                  float *grad_bias, size N, size L, size E, size states, size backwards, size threads) {
    const size groups = (E + LANES - 1) / LANES, chunks = (L + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const size blocks = (groups + GROUPS - 1) / GROUPS, tile = SCAN_CHUNK * states;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        vec *memory = take(4 * tile + (3 * GROUPS + 1) * states + 2 * GROUPS, sizeof(vec));
        vec *hs = memory, *decays = hs + tile + states, *dB = decays + tile, *dC = dB + tile; /* hs[0]: before */
        vec *later = dC + tile, *rates = later + GROUPS * states, *dA = rates + GROUPS * states;
        vec *dD = dA + GROUPS * states, *dbias = dD + GROUPS;
        Token tokens[SCAN_CHUNK];
        failed |= !memory;
#pragma omp for schedule(static)
        for (size task = 0; task < N * blocks; task++) {
            const size sample = task / blocks, block = task % blocks, first = block * GROUPS;
            const size mine = smaller(GROUPS, groups - first);
            if (!memory) continue;
            memset(later, 0, GROUPS * states * sizeof(vec));
            memset(dA, 0, (GROUPS * states + 2 * GROUPS) * sizeof(vec));
            for (size g = 0; g < mine; g++) {
                const size e = (first + g) * LANES;
                load_rates(rates + g * states, A, states, E, e, smaller(LANES, E - e));
            }
            for (size chunk = chunks - 1; chunk >= 0; chunk--) {
                const size begin = chunk * SCAN_CHUNK, count = smaller(SCAN_CHUNK, L - begin);
                memset(dB, 0, 2 * tile * sizeof(vec));
                for (size g = 0; g < mine; g++) {
                    const size e = (first + g) * LANES, lanes = smaller(LANES, E - e);
                    const float *from = kept + (sample * chunks + chunk) * states * E + e;
                    const vec *rate = rates + g * states, skip = load(D + e, lanes), offset = load(bias + e, lanes);
                    vec *carried = later + g * states, *sum_A = dA + g * states;
                    for (size n = 0; n < states; n++) hs[n] = load(from + n * E, lanes);
                    for (size step = 0; step < count; step++) {
                        const size token = sample * L + (backwards ? L - 1 - begin - step : begin + step);
                        const float *b = B + token * states;
                        vec *h = hs + step * states, *next = h + states, *decay = decays + step * states;
                        Token *now = tokens + step;
                        now->dt = softplus(load(delta + token * E + e, lanes) + offset, &now->slope);
                        now->input = load(u + token * E + e, lanes);
                        now->gate = load(z + token * E + e, lanes);
                        const vec dt = now->dt, x = dt * now->input;
                        for (size n = 0; n < states; n++) {
                            decay[n] = exp_lanes(dt * rate[n]);
                            next[n] = h[n] * decay[n] + x * b[n];
                        }
                    }
                    for (size step = count - 1; step >= 0; step--) {
                        const size token = sample * L + (backwards ? L - 1 - begin - step : begin + step);
                        const size at = token * E + e;
                        const float *b = B + token * states, *c = C + token * states;
                        const vec *before = hs + step * states, *h = before + states, *decay = decays + step * states;
                        vec *to_B = dB + step * states, *to_C = dC + step * states;
                        const vec dt = tokens[step].dt, input = tokens[step].input, gate = tokens[step].gate;
                        const vec x = dt * input, s = sigmoid(gate), go = load(grad + at, lanes), gy = go * gate * s;
                        vec y = skip * input, to_dt = {0}, to_x = {0};
                        for (size n = 0; n < states; n++) {
                            const vec slope = carried[n] + gy * c[n]; /* of h[n] */
                            const vec passed = slope * decay[n], w = passed * before[n];
                            y += h[n] * c[n];
                            to_C[n] += h[n] * gy;
                            to_B[n] += slope * x;
                            to_x += slope * b[n];
                            to_dt += w * rate[n];
                            sum_A[n] += w * dt;
                            carried[n] = passed;
                        }
                        const vec to_delta = (to_dt + to_x * input) * tokens[step].slope;
                        store(grad_z + at, go * y * s * (1.0f + gate * (1.0f - s)), lanes);
                        store(grad_u + at, to_x * dt + gy * skip, lanes);
                        store(grad_delta + at, to_delta, lanes);
                        dbias[g] += to_delta;
                        dD[g] += gy * input;
                    }
                }
                for (size step = 0; step < count; step++) {
                    const size token = backwards ? L - 1 - begin - step : begin + step;
                    const size to = ((sample * blocks + block) * L + token) * states;
                    for (size n = 0; n < states; n++) {
                        grad_B[to + n] = sum_lanes(dB[step * states + n]);
                        grad_C[to + n] = sum_lanes(dC[step * states + n]);
                    }
                }
            }
            for (size g = 0; g < mine; g++) {
                const size e = (first + g) * LANES, lanes = smaller(LANES, E - e);
                for (size n = 0; n < states; n++)
                    store(grad_A + (sample * states + n) * E + e, dA[g * states + n], lanes);
                store(grad_D + sample * E + e, dD[g], lanes);
                store(grad_bias + sample * E + e, dbias[g], lanes);
            }
        }
        free(memory);
    }
    return failed;
}
