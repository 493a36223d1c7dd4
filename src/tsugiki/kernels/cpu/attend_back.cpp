// Attention back: probabilities are computed again from what the way forth kept. Sums for keys and
// values are held transposed, so that probabilities, as they come, are the right side of each product
// and need no transposing. Knows no torch.

#include "attend.hpp"

#ifdef TILES
namespace {

// Σ x · y of d entries. Written out: compilers leave the plain loop scalar in here.
inline float inner(const bfloat* x, const bfloat* y, int64_t d) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < d; at += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + at)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(y + at)));
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// rows (count, d) transposed: (d, count); count in 16s.
void turn_over(const bfloat* rows, int64_t count, int64_t d, bfloat* to) {
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t column = 0; column < d; column += 32) {
            __m512i in[16], out[16];
            for (int64_t j = 0; j < 16; ++j) in[j] = _mm512_loadu_si512(rows + (i + j) * d + column);
            transpose(in, out);
            for (int64_t j = 0; j < 16; ++j) {
                bfloat* at = to + (column + 2 * j) * count + i;
                _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(out[j]));
                _mm256_storeu_si256((__m256i*)(at + count),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(out[j], 16)));
            }
        }
}

// Sums held as (d, tokens) in tiles to rows (tokens, d) of y.
void put_turned(char* sums, int64_t length, int64_t d, float* y) {
    for (int64_t token = 0; token < length; token += 16)
        for (int64_t column = 0; column < d; column += 16) {
            char* block = sums + (token / SIDE * (d / SIDE) + column / SIDE) * 4 * TILE;
            __m512i in[16], out[16];
            for (int64_t j = 0; j < 16; ++j)
                in[j] = _mm512_load_si512(piece(block, column % SIDE + j, token % SIDE));
            transpose(in, out);
            for (int64_t j = 0; j < std::min<int64_t>(16, length - token); ++j)
                _mm512_storeu_si512(y + (token + j) * d + column, out[j]);
        }
}

// Of 32 queries and 32 keys: probabilities and the gradients of scores in bfloat16, a few rows at a
// time while the tiles work on the next keys.
struct Slopes {
    const Attention& a;
    char *scores = nullptr, *upstream = nullptr;
    int64_t query = 0, key = 0, done = SIDE;
    const float *norms = nullptr, *own = nullptr;
    bfloat *p = nullptr, *g = nullptr;

    void write(int64_t count) {
        const bool open = a.open(query, key);
        const __m512 scale = _mm512_set1_ps(a.scale);
        for (const int64_t stop = std::min(SIDE, done + count); done < stop; ++done) {
            __m512 e[2], s[2];
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t at = 16 * half;
                const __m512 norm = _mm512_set1_ps(norms[done]);
                __m512 x = scaled(_mm512_load_ps(piece(scores, done, at)), scale), slope = scale;
                if (a.cap > 0.0f) {
                    x = capped(x, a.cap);
                    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / a.cap));
                    slope = _mm512_mul_ps(scale, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0f)));
                }
                e[half] = exponential(_mm512_sub_ps(x, norm));
                if (!open) e[half] = _mm512_maskz_mov_ps(a.seen(query + done, key + at), e[half]);
                const __m512 d = _mm512_load_ps(piece(upstream, done, at));
                s[half] = _mm512_mul_ps(_mm512_mul_ps(e[half], slope),
                                        _mm512_sub_ps(d, _mm512_set1_ps(own[done])));
            }
            _mm512_store_si512(p + done * BLOCK, (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]));
            _mm512_store_si512(g + done * BLOCK, (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]));
        }
    }
};

// One thread's memory on the way back.
struct Desk {
    const Memory keys, turned, values, key_sums, value_sums, last, x, g, xt, gt, sums, scores,
        upstream, p, s, laid;
    Desk(int64_t most, int64_t d)
        : keys(most * d * 2), turned(most * d * 2), values(most * d * 2), key_sums(most * d * 4),
          value_sums(most * d * 4), last(BLOCK * d * 2), x(BLOCK * d * 2), g(BLOCK * d * 2),
          xt(BLOCK * d * 2), gt(BLOCK * d * 2), sums(BLOCK * d * 4), scores(8 * TILE),
          upstream(8 * TILE), p(BLOCK * BLOCK * 2), s(BLOCK * BLOCK * 2), laid(BLOCK * BLOCK * 2) {}
    bool whole() const {
        return keys.at && turned.at && values.at && key_sums.at && value_sums.at && last.at && x.at &&
               g.at && xt.at && gt.at && sums.at && scores.at && upstream.at && p.at && s.at && laid.at;
    }
};

// sums (d, keys) += rows (d, queries) · weights (queries, keys), for one block of each.
void collect(const bfloat* rows, const bfloat* weights, int64_t keys, int64_t d, char* laid,
             char* sums) {
    Nothing nothing;
    lay_block(Stored<bfloat>{weights, keys, BLOCK, true}, 0, keys / SIDE, 0, BLOCK, laid);
    for (int64_t panel = 0; panel < keys / SIDE; ++panel)
        for (int64_t row = 0; row < d; row += SIDE) {
            char* to = sums + (panel * (d / SIDE) + row / SIDE) * 4 * TILE;
            multiply(rows + row * BLOCK, BLOCK * 2, laid + panel * SIDE * BLOCK * 2, BLOCK * 2, to,
                     to, nothing);
        }
}

void back_of(const Attention& a, const Gradients<bfloat>& to, const Task& t, Desk& m) {
    const int64_t d = a.d, stride = a.heads * d;
    Nothing nothing;
    bfloat *spare = reinterpret_cast<bfloat*>(m.last.at), *x = reinterpret_cast<bfloat*>(m.x.at);
    bfloat *g = reinterpret_cast<bfloat*>(m.g.at), *xt = reinterpret_cast<bfloat*>(m.xt.at);
    bfloat *gt = reinterpret_cast<bfloat*>(m.gt.at), *p = reinterpret_cast<bfloat*>(m.p.at);
    bfloat* s = reinterpret_cast<bfloat*>(m.s.at);
    Slopes slopes{a};
    int64_t turn = 0;
    std::memset(p, 0, BLOCK * BLOCK * 2);  // rows beyond a document's end meet zeros
    std::memset(s, 0, BLOCK * BLOCK * 2);
    lay_tokens(a.k.row(t.key, t.start), a.k.ts, t.length, d, m.keys.at, m.turned.at, spare);
    lay_tokens(a.v.row(t.key, t.start), a.v.ts, t.length, d, m.values.at, nullptr, spare);
    std::memset(m.key_sums.at, 0, up(t.length, BLOCK) * d * 4);
    std::memset(m.value_sums.at, 0, up(t.length, BLOCK) * d * 4);
    for (int64_t query = 0; query < t.length; query += BLOCK) {
        const int64_t high = std::min(BLOCK, t.length - query), rows = up(high, SIDE);
        const int64_t place = ((t.start + query) * a.heads + t.head) * d;
        copy_rows(a.q.row(t.head, t.start + query), a.q.ts, high, BLOCK, d, x);
        copy_rows(to.grad + place, stride, high, BLOCK, d, g);
        turn_over(x, BLOCK, d, xt);
        turn_over(g, BLOCK, d, gt);
        float norms[BLOCK], own[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i) {
            norms[i] = INFINITY, own[i] = 0.0f;
            if (i >= high) continue;
            norms[i] = to.norms[t.head * a.tokens + t.start + query + i];
            own[i] = inner(g + i * d, to.out + place + i * stride, d);
        }
        std::memset(m.sums.at, 0, BLOCK * d * 4);
        for (int64_t key = a.begin(query); key < query + high; key += BLOCK) {
            const int64_t deep = std::min(BLOCK, up(t.length - key, SIDE));
            for (int64_t row = 0; row < rows; row += SIDE) {
                int64_t end = 0;
                for (int64_t at = 0; at < deep; at += SIDE) {
                    bfloat *pi = p + row * BLOCK + at, *si = s + row * BLOCK + at;
                    if (a.blind(query + row, key + at)) {
                        for (int64_t i = 0; i < SIDE; ++i) {
                            std::memset(pi + i * BLOCK, 0, SIDE * 2);
                            std::memset(si + i * BLOCK, 0, SIDE * 2);
                        }
                        continue;
                    }
                    char *scores = m.scores.at + turn % 2 * 4 * TILE;
                    char* upstream = m.upstream.at + turn++ % 2 * 4 * TILE;
                    multiply(x + row * d, d * 2, m.keys.at + (key + at) * d * 2, d * 2, nullptr,
                             scores, slopes);
                    multiply(g + row * d, d * 2, m.values.at + (key + at) * d * 2, d * 2, nullptr,
                             upstream, slopes);
                    slopes.write(SIDE);
                    slopes.scores = scores, slopes.upstream = upstream, slopes.done = 0;
                    slopes.query = query + row, slopes.key = key + at;
                    slopes.norms = norms + row, slopes.own = own + row;
                    slopes.p = pi, slopes.g = si;
                    end = at + SIDE;
                }
                slopes.write(SIDE);
                for (int64_t at = 0; end && at < d; at += SIDE) {
                    char* sums = m.sums.at + (row * d + at * SIDE) * 4;
                    multiply(s + row * BLOCK, BLOCK * 2, m.turned.at + (key * d + at * deep) * 2,
                             end * 2, sums, sums, nothing);
                }
            }
            collect(gt, p, deep, d, m.laid.at, m.value_sums.at + key * d * 4);
            collect(xt, s, deep, d, m.laid.at, m.key_sums.at + key * d * 4);
        }
        const float ones[SIDE] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        for (int64_t row = 0; row < high; row += SIDE)
            put_rows(m.sums.at + row * d * 4, ones, std::min(SIDE, high - row), d,
                     to.q + place + row * stride, stride);
    }
    const int64_t part = (t.head * a.tokens + t.start) * d;
    put_turned(m.key_sums.at, t.length, d, to.parts_k + part);
    put_turned(m.value_sums.at, t.length, d, to.parts_v + part);
}

}  // namespace

extern "C" {

// 0: no memory.
int attend_back_bf16(ATTENTION(bfloat), const bfloat* out, const bfloat* grad, const float* norms,
                     bfloat* grad_q, bfloat* grad_k, bfloat* grad_v, float* parts_k,
                     float* parts_v, int threads) {
    const Attention a{THE_ATTENTION};
    const Gradients<bfloat> to{out, grad, norms, grad_q, grad_k, grad_v, parts_k, parts_v};
    return all_back<Registers, Desk>(
        a, to, longest(a, BLOCK), threads,
        [&](const Task& task, Desk& desk) { back_of(a, to, task, desk); });
}
}
#endif
