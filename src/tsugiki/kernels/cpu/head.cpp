// The head's loss and its gradient in one pass over the vocabulary, in tiles.
//
// 32 rows' logits of one block of the vocabulary are computed, exponentiated against the largest seen
// so far and multiplied with the same block on the way back, all within the core's caches: logits
// are never in memory and never rounded. The running sums are scaled down where a larger logit
// comes, as in attention without a matrix of scores (Milakov and Gimelshein, arXiv:1805.02867; Dao et
// al., arXiv:2205.14135). The target's own entry, p - 1, outweighs all others together: it is left
// out of the product and added in fp32 from the sum of the others. Knows no torch.

#include "tiles.hpp"

#ifdef TILES
namespace {

constexpr int64_t BLOCK = 256;  // of the vocabulary: laid out both ways, half of the second cache or less
constexpr int64_t TALL = 1024;  // rows of one thread at a time: each lays out the whole vocabulary

struct Head {
    const bfloat *x, *w;  // (rows, width), (vocabulary, width)
    const int64_t* targets;
    float* losses;
    bfloat* grad;  // (rows, width), or null
    int64_t rows, width, vocabulary, xs, ws;
    float scale, cap, factor;
};

// Of one row: the largest logit so far, and relative to it the sum of the others' exponentials.
struct Running {
    float best, others, target;  // target: its logit
};

// The largest logit of a row in one block; where capped, logits become cap · tanh(scale · x / cap).
float largest(const Head& h, char* strip, int64_t row, int64_t count) {
    __m512 best = _mm512_set1_ps(-INFINITY);
    for (int64_t at = 0; at < count; at += 16) {
        float* logits = piece(strip, row, at);
        if (h.cap > 0.0f)
#pragma omp simd
            for (int64_t i = 0; i < 16; ++i)
                logits[i] = h.cap * hyperbolic_tangent(logits[i] * h.scale / h.cap);
        const __m512 some = _mm512_load_ps(logits);
        best = _mm512_mask_max_ps(best, first(count - at), best, some);
    }
    return _mm512_reduce_max_ps(best) * (h.cap > 0.0f ? 1.0f : h.scale);
}

// A row's logits of one block to e^(x - best) in bfloat16, times the slope of the cap; the running
// sums carried on. Returns by what to scale the sums of the blocks before.
float weigh(const Head& h, char* strip, int64_t row, int64_t count, int64_t own, Running& r,
            bfloat* to) {
    const float best = std::max(r.best, largest(h, strip, row, count));
    const float scale = h.cap > 0.0f ? 1.0f : h.scale;
    if (own >= 0 && own < count) {
        float* logit = piece(strip, row, own) + own % 16;
        r.target = *logit * scale;
        *logit = (best - 80.0f) / scale;
    }
    const __m512 top = _mm512_set1_ps(-best), factor = _mm512_set1_ps(scale);
    const __m512 cap = _mm512_set1_ps(1.0f / h.cap), one = _mm512_set1_ps(1.0f);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < BLOCK; at += SIDE) {
        __m512 p[2];
        for (int64_t half = 0; half < 2; ++half) {
            const __mmask16 mask = first(count - at - 16 * half);
            const __m512 x = _mm512_maskz_load_ps(mask, piece(strip, row, at + 16 * half));
            const __m512 e = _mm512_maskz_mov_ps(mask, exponential(_mm512_fmadd_ps(x, factor, top)));
            const __m512 t = _mm512_mul_ps(x, cap);
            sum = _mm512_add_ps(sum, e);
            p[half] = h.cap > 0.0f ? _mm512_mul_ps(e, _mm512_fnmadd_ps(t, t, one)) : e;
        }
        _mm512_store_si512(to + at, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
    }
    const float shrink = exponential(r.best - best);
    r.others = r.others * shrink + _mm512_reduce_add_ps(sum);
    r.best = best;
    return shrink;
}

// What is left to do for a row once it has met the whole vocabulary.
void finish(const Head& h, int64_t row, const Running& r, char* strip, int64_t at) {
    const float own = exponential(r.target - r.best), sum = r.others + own;
    h.losses[row] = std::log(sum) - (r.target - r.best);
    if (!h.grad) return;
    const float part = h.factor * h.scale / sum, t = h.cap > 0.0f ? r.target / h.cap : 0.0f;
    const float target = -r.others * part * (1.0f - t * t);
    const bfloat* w = h.w + h.targets[row] * h.ws;
    bfloat* to = h.grad + row * h.width;
    for (int64_t column = 0; column < h.width; column += 16) {
        const float* sums = piece(strip, at, column);
#pragma omp simd
        for (int64_t i = 0; i < 16; ++i)
            put(to + column + i, sums[i] * part + wide(w[column + i]) * target);
    }
}

// Whether there was memory for it.
bool head_rows_all(const Head& h, int threads) {
    const int64_t tall = part(up((h.rows + threads - 1) / threads, SIDE), TALL, SIDE);
    const int64_t groups = (h.rows + tall - 1) / tall, size = 2;
    const int64_t pass = part(h.width, MOST_K / size, DEPTH / size);
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory forth(BLOCK * h.width * size), back(BLOCK * h.width * size);
        const Memory sums(tall * h.width * 4), logits(SIDE * BLOCK * 4), p(SIDE * BLOCK * size);
        const Memory rows(tall * h.width * size), running(tall * sizeof(Running));
        const Memory last(BLOCK * h.width * size);
        Nothing nothing;
        whole = forth.at && back.at && sums.at && logits.at && p.at && rows.at && running.at &&
                last.at;
#pragma omp for schedule(dynamic)
        for (int64_t group = 0; group < groups; ++group) {
            if (!whole) continue;
            const int64_t start = group * tall, high = std::min(tall, h.rows - start);
            bfloat* x = reinterpret_cast<bfloat*>(rows.at);
            std::memset(rows.at, 0, tall * h.width * size);
            for (int64_t i = 0; i < high; ++i)
                std::memcpy(x + i * h.width, h.x + (start + i) * h.xs, h.width * size);
            std::memset(sums.at, 0, tall * h.width * 4);
            Running* seen = reinterpret_cast<Running*>(running.at);
            for (int64_t i = 0; i < tall; ++i) seen[i] = {-INFINITY, 0.0f, 0.0f};
            bfloat* weights = reinterpret_cast<bfloat*>(p.at);
            for (int64_t from = 0; from < h.vocabulary; from += BLOCK) {
                const int64_t count = std::min(BLOCK, h.vocabulary - from);
                const int64_t panels = (count + SIDE - 1) / SIDE;
                const bfloat* w = h.w + from * h.ws;
                int64_t stride = h.ws;
                if (count % SIDE) {  // the last ones, with zeros below them
                    std::memset(last.at, 0, BLOCK * h.width * size);
                    for (int64_t i = 0; i < count; ++i)
                        std::memcpy(last.at + i * h.width * size, w + i * stride, h.width * size);
                    w = reinterpret_cast<const bfloat*>(last.at);
                    stride = h.width;
                }
                const Stored<bfloat> one{w, panels * SIDE, stride, false};
                const Stored<bfloat> other{w, h.width, stride, true};
                for (int64_t at = 0; at < h.width; at += pass)
                    lay_block(one, 0, panels, at, std::min(at + pass, h.width),
                              forth.at + at * size * panels * SIDE);
                if (h.grad) lay_block(other, 0, h.width / SIDE, 0, panels * SIDE, back.at);
                for (int64_t top = 0; top < high; top += SIDE) {
                    for (int64_t at = 0; at < h.width; at += pass) {
                        const int64_t depth = (std::min(at + pass, h.width) - at) * size;
                        const char* tiles = forth.at + at * size * panels * SIDE;
                        for (int64_t panel = 0; panel < panels; ++panel) {
                            char* to = logits.at + panel * 4 * TILE;
                            multiply(x + top * h.width + at, h.width * size,
                                     tiles + panel * SIDE * depth, depth, at ? to : nullptr, to,
                                     nothing);
                        }
                    }
                    char* strip = sums.at + top * h.width * 4;
                    const int64_t some = std::min(SIDE, high - top);
                    for (int64_t i = 0; i < SIDE; ++i) {
                        bfloat* to = weights + i * BLOCK;
                        if (i >= some) {
                            std::memset(to, 0, BLOCK * size);
                            continue;
                        }
                        const float shrink = weigh(h, logits.at, i, count,
                                                   h.targets[start + top + i] - from,
                                                   seen[top + i], to);
                        if (shrink == 1.0f || from == 0 || !h.grad) continue;
                        for (int64_t column = 0; column < h.width; column += 16) {
                            float* at = piece(strip, i, column);
#pragma omp simd
                            for (int64_t j = 0; j < 16; ++j) at[j] *= shrink;
                        }
                    }
                    if (!h.grad) continue;
                    for (int64_t panel = 0; panel < h.width / SIDE; ++panel) {
                        char* to = strip + panel * 4 * TILE;
                        multiply(weights, BLOCK * size, back.at + panel * SIDE * panels * SIDE * size,
                                 panels * SIDE * size, to, to, nothing);
                    }
                }
            }
            for (int64_t i = 0; i < high; ++i)
                finish(h, start + i, seen[i], sums.at + i / SIDE * SIDE * h.width * 4, i % SIDE);
        }
    }
    return whole;
}

}  // namespace

extern "C" {

// 0: no memory.
int head_rows_bf16(const bfloat* x, const bfloat* w, const int64_t* targets, float* losses,
                   bfloat* grad, int64_t rows, int64_t width, int64_t vocabulary, int64_t xs,
                   int64_t ws, float scale, float cap, float factor, int threads) {
    return head_rows_all(
        Head{x, w, targets, losses, grad, rows, width, vocabulary, xs, ws, scale, cap, factor},
        threads);
}
}
#endif
