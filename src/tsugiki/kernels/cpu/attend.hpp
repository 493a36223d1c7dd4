// Causal attention of documents that lie end to end, in tiles: what its two ways share.
//
// No matrix of scores is in memory: 32 queries meet a block of keys at a time (Dao et al.,
// arXiv:2205.14135). Nothing is padded and nothing gathered: a document is rows of the flat batch.
// Knows no torch.

#pragma once

#include "documents.hpp"
#include "tiles.hpp"

#ifdef TILES
namespace {

constexpr int64_t BLOCK = 128;  // keys at a time, and on the way back queries

struct Attention : Asked<bfloat> {
    // Which of 16 keys from `key` on a query sees.
    __mmask16 seen(int64_t query, int64_t key) const {
        const __mmask16 past = ::first(query + 1 - key);
        return window ? past & ~::first(query + 1 - window - key) : past;
    }
    // The first key that any query from this one on sees, down to whole blocks.
    int64_t begin(int64_t query) const {
        return Asked::first(query) / BLOCK * BLOCK;
    }
    // 32 queries see none or all of 32 keys.
    bool blind(int64_t query, int64_t key) const {
        return key > query + SIDE - 1 || (window && key + SIDE - 1 + window <= query);
    }
    bool open(int64_t query, int64_t key) const {
        return key + SIDE - 1 <= query && (!window || key + window > query + SIDE - 1);
    }
};

// `count` rows of d entries, with zeros below them up to `all`.
void copy_rows(const bfloat* from, int64_t stride, int64_t count, int64_t all, int64_t d,
               bfloat* to) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * d, from + i * stride, d * 2);
    std::memset(to + count * d, 0, (all - count) * d * 2);
}

// A document's keys or values for the tiles, block after block: as columns (32 tokens a panel, all
// of d deep) and as rows (32 of d a panel, a block's tokens deep); either may be null.
void lay_tokens(const bfloat* from, int64_t stride, int64_t length, int64_t d, char* columns,
                char* rows, bfloat* last) {
    for (int64_t at = 0; at < length; at += BLOCK) {
        const int64_t count = std::min(BLOCK, length - at), whole = up(count, SIDE);
        const bfloat* w = from + at * stride;
        int64_t step = stride;
        if (count % SIDE) {
            copy_rows(w, stride, count, whole, d, last);
            w = last, step = d;
        }
        if (columns)
            lay_block(Stored<bfloat>{w, whole, step, false}, 0, whole / SIDE, 0, d,
                      columns + at * d * 2);
        if (rows)
            lay_block(Stored<bfloat>{w, d, step, true}, 0, d / SIDE, 0, whole, rows + at * d * 2);
    }
}

// Scores times a factor, rounded: the largest minus itself is zero only so, and a compiler must not
// join this with what follows.
inline __m512 scaled(__m512 x, __m512 factor) {
    return _mm512_mul_round_ps(x, factor, _MM_FROUND_CUR_DIRECTION);
}

inline __m512 capped(__m512 x, float cap) {
    alignas(64) float some[16];
    _mm512_store_ps(some, x);
#pragma omp simd
    for (int i = 0; i < 16; ++i) some[i] = cap * hyperbolic_tangent(some[i] / cap);
    return _mm512_load_ps(some);
}

// (32, d) of sums in tiles, each row times a factor, to rows of y.
void put_rows(char* sums, const float* factors, int64_t count, int64_t d, bfloat* y,
              int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
        const __m512 factor = _mm512_set1_ps(factors[i]);
        for (int64_t at = 0; at < d; at += SIDE) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(piece(sums, i, at)), factor);
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(piece(sums, i, at + 16)), factor);
            _mm512_storeu_si512(y + i * stride + at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

}  // namespace

#endif
