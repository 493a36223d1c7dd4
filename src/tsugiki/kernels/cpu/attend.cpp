// Attention forth: the largest score so far and the sum of exponentials are carried from block to
// block of keys; one number a query is kept for the way back. Knows no torch.

#include "attend.hpp"

#ifdef TILES
namespace {

// A query's running numbers: the largest score so far, and relative to it the sum of e^score.
struct Running {
    float best = -INFINITY, sum = 0.0f;

    // A block's largest score and its sum of e^(score - best) come in; by what to scale what was
    // summed before.
    float carry(float now, __m512 more) {
        const float shrink = best == now ? 1.0f : best == -INFINITY ? 0.0f : exponential(best - now);
        sum = sum * shrink + _mm512_reduce_add_ps(more);
        best = now;
        return shrink;
    }
};

// One query's scores of a block of keys, of which it sees the first `seen`, to e^(x - best) in
// bfloat16; zeros up to `count`.
float weigh(const Attention& a, char* scores, int64_t row, int64_t seen, int64_t count, Running& r,
            bfloat* p) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    int64_t at = 0;
    for (; at + 16 <= seen; at += 16)
        top = _mm512_max_ps(_mm512_load_ps(piece(scores, row, at)), top);
    if (at < seen)
        top = _mm512_mask_max_ps(top, first(seen - at), top, _mm512_load_ps(piece(scores, row, at)));
    const float now = std::max(r.best, a.scale * _mm512_reduce_max_ps(top));
    const __m512 scale = _mm512_set1_ps(a.scale), less = _mm512_set1_ps(now);
    __m512 all[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (at = 0; at + SIDE <= seen; at += SIDE) {
        __m512 e[2];
        for (int i = 0; i < 2; ++i) {
            const __m512 x = scaled(_mm512_load_ps(piece(scores, row, at + 16 * i)), scale);
            e[i] = exponential(_mm512_sub_ps(x, less));
            all[i] = _mm512_add_ps(all[i], e[i]);
        }
        _mm512_store_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
    }
    for (; at < count; at += SIDE) {
        __m512 e[2];
        for (int i = 0; i < 2; ++i) {
            const __m512 x = scaled(_mm512_load_ps(piece(scores, row, at + 16 * i)), scale);
            e[i] = _mm512_maskz_mov_ps(first(seen - at - 16 * i),
                                       exponential(_mm512_sub_ps(x, less)));
            all[i] = _mm512_add_ps(all[i], e[i]);
        }
        _mm512_store_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
    }
    return r.carry(now, _mm512_add_ps(all[0], all[1]));
}

// The same with a cap, a window or a scale that is not positive, for a query at its own place.
float weigh_some(const Attention& a, char* scores, int64_t row, int64_t query, int64_t key,
                 int64_t count, Running& r, bfloat* p) {
    const __m512 scale = _mm512_set1_ps(a.scale);
    __m512 top = _mm512_set1_ps(r.best);
    for (int64_t at = 0; at < count; at += 16) {
        float* some = piece(scores, row, at);
        __m512 x = scaled(_mm512_load_ps(some), scale);
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
    return r.carry(now, all);
}

// out (tokens, heads, d), norms (heads, tokens): log of the sum of e^score. Whether there was memory.
bool forward(const Attention& a, bfloat* out, float* norms, int threads) {
    const int64_t most = longest(a, BLOCK), d = a.d;
    const bool plain = a.cap <= 0.0f && !a.window && a.scale > 0.0f;
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
                Running running[SIDE];
                if (a.sinks) std::fill_n(running, SIDE, Running{a.sinks[t.head], 1.0f});
                std::memset(sums.at, 0, SIDE * d * 4);
                for (int64_t key = a.begin(query); key < query + high; key += BLOCK) {
                    const int64_t count = std::min(BLOCK, up(query + high - key, SIDE));
                    for (int64_t at = 0; at < count; at += SIDE)
                        multiply(x, stride * 2, keys.at + (key + at) * d * 2, d * 2, nullptr,
                                 scores.at + at / SIDE * 4 * TILE, nothing);
                    for (int64_t i = 0; i < SIDE; ++i) {
                        const int64_t place = query + std::min(i, high - 1);
                        bfloat* p = weights + i * BLOCK;
                        const float shrink =
                            plain ? weigh(a, scores.at, i, std::min(count, place + 1 - key), count,
                                          running[i], p)
                                  : weigh_some(a, scores.at, i, place, key, count, running[i], p);
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
                    const Running& r = running[i];
                    factors[i] = 1.0f / r.sum;
                    norms[t.head * a.tokens + t.start + query + i] = r.best + std::log(r.sum);
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
int attend_bf16(ATTENTION(bfloat), bfloat* out, float* norms, int threads) {
    return forward(Attention{THE_ATTENTION}, out, norms, threads);
}
}
#endif
