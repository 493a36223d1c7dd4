// Attention forth: the largest score so far and the sum of exponentials are carried from block to
// block of keys; one number a query is kept for the way back. Knows no torch.

#include "attend.hpp"

#ifdef TILES
namespace {

// One query's scores of a block of keys to e^(x - best) in bfloat16; its running sums carried on.
// Returns by what to scale what was summed before.
float weigh(const Attention& a, char* scores, int64_t row, int64_t query, int64_t key,
            int64_t count, float& best, float& sum, bfloat* p) {
    const __m512 scale = _mm512_set1_ps(a.scale);
    __m512 top = _mm512_set1_ps(best);
    for (int64_t at = 0; at < count; at += 16) {
        float* some = piece(scores, row, at);
        __m512 x = _mm512_mul_ps(_mm512_load_ps(some), scale);
        if (a.cap > 0.0f) x = capped(x, a.cap);
        _mm512_store_ps(some, x);
        top = _mm512_mask_max_ps(top, a.seen(query, key + at), top, x);
    }
    const float now = _mm512_reduce_max_ps(top);
    __m512 all = _mm512_setzero_ps();
    for (int64_t at = 0; at < count; at += SIDE) {
        __m512 e[2];
        for (int64_t half = 0; half < 2; ++half) {
            const __m512 x = _mm512_load_ps(piece(scores, row, at + 16 * half));
            e[half] = _mm512_maskz_mov_ps(a.seen(query, key + at + 16 * half),
                                          exponential(_mm512_sub_ps(x, _mm512_set1_ps(now))));
            all = _mm512_add_ps(all, e[half]);
        }
        _mm512_store_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
    }
    const float shrink = best == -INFINITY ? 0.0f : exponential(best - now);
    sum = sum * shrink + _mm512_reduce_add_ps(all);
    best = now;
    return shrink;
}

// out (tokens, heads, d), norms (heads, tokens): log of the sum of e^score. Whether there was memory.
bool forward(const Attention& a, bfloat* out, float* norms, int threads) {
    const int64_t most = longest(a), d = a.d;
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory keys(most * d * 2), values(most * d * 2), last(BLOCK * d * 2);
        const Memory sums(SIDE * d * 4), scores(SIDE * BLOCK * 4), p(SIDE * BLOCK * 2);
        const Memory rows(SIDE * d * 2);
        Nothing nothing;
        whole = keys.at && values.at && last.at && sums.at && scores.at && p.at && rows.at;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < a.documents * a.heads; ++number) {
            if (!whole) continue;
            const Task t = task_of(a, number);
            bfloat* spare = reinterpret_cast<bfloat*>(last.at);
            bfloat* weights = reinterpret_cast<bfloat*>(p.at);
            lay_tokens(a.k.row(t.key, t.start), a.k.ts, t.length, d, keys.at, nullptr, spare);
            lay_tokens(a.v.row(t.key, t.start), a.v.ts, t.length, d, nullptr, values.at, spare);
            for (int64_t query = 0; query < t.length; query += SIDE) {
                const int64_t high = std::min(SIDE, t.length - query);
                const bfloat* x = a.q.row(t.head, t.start + query);
                int64_t stride = a.q.ts;
                if (high < SIDE) {
                    copy_rows(x, stride, high, SIDE, d, reinterpret_cast<bfloat*>(rows.at));
                    x = reinterpret_cast<bfloat*>(rows.at), stride = d;
                }
                float best[SIDE], sum[SIDE];
                for (int64_t i = 0; i < SIDE; ++i) best[i] = -INFINITY, sum[i] = 0.0f;
                std::memset(sums.at, 0, SIDE * d * 4);
                for (int64_t key = a.begin(query); key < query + high; key += BLOCK) {
                    const int64_t count = std::min(BLOCK, up(query + high - key, SIDE));
                    for (int64_t at = 0; at < count; at += SIDE)
                        multiply(x, stride * 2, keys.at + (key + at) * d * 2, d * 2, nullptr,
                                 scores.at + at / SIDE * 4 * TILE, nothing);
                    for (int64_t i = 0; i < SIDE; ++i) {
                        const int64_t place = query + std::min(i, high - 1);
                        const float shrink = weigh(a, scores.at, i, place, key, count, best[i],
                                                   sum[i], weights + i * BLOCK);
                        if (shrink == 1.0f || shrink == 0.0f) continue;
                        for (int64_t at = 0; at < d; at += 16) {
                            float* some = piece(sums.at, i, at);
                            _mm512_store_ps(some, _mm512_mul_ps(_mm512_load_ps(some),
                                                                _mm512_set1_ps(shrink)));
                        }
                    }
                    // a block's values are laid out as deep as the block is
                    const int64_t deep = std::min(BLOCK, up(t.length - key, SIDE));
                    for (int64_t at = 0; at < d; at += SIDE) {
                        char* to = sums.at + at / SIDE * 4 * TILE;
                        multiply(weights, BLOCK * 2, values.at + (key * d + at * deep) * 2,
                                 count * 2, to, to, nothing);
                    }
                }
                float factors[SIDE];
                for (int64_t i = 0; i < high; ++i) {
                    factors[i] = 1.0f / sum[i];
                    norms[t.head * a.tokens + t.start + query + i] = best[i] + std::log(sum[i]);
                }
                put_rows(sums.at, factors, high, d,
                         out + ((t.start + query) * a.heads + t.head) * d, a.heads * d);
            }
        }
    }
    return whole;
}

}  // namespace

extern "C" {

// 0: no memory.
int attend_bf16(ATTENTION, bfloat* out, float* norms, int threads) {
    return forward(THE_ATTENTION, out, norms, threads);
}
}
#endif
