// Causal attention of documents that lie end to end, fp32, in vector registers of any CPU.
//
// Forth, a block of queries meets all keys that it may see, so that a row of scores is whole when
// its softmax is taken; its largest score and one over its sum are kept, and on the way back a block
// of keys at a time is computed again. Each head of each document is one task, so results do not
// depend on threads. Plain C++ with the vectors of GCC and Clang. Knows no torch.

#include <cstdlib>

#include "documents.hpp"

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, HIGH = 8;  // of a vector; rows of a product held at once
#else
constexpr int64_t LANES = 8, HIGH = 4;
#endif
constexpr int64_t PANEL = 2 * LANES;  // keys that lie together, transposed
constexpr int64_t QUERIES = 64;       // at a time
constexpr int64_t KEYS = 128;         // at a time on the way back

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));

inline Lanes& at(float* x) { return *reinterpret_cast<Lanes*>(x); }
inline const Lanes& at(const float* x) { return *reinterpret_cast<const Lanes*>(x); }

// e^x as numbers.hpp has it.
inline Lanes exponential(Lanes x) {
    x = x < -80.0f ? Lanes{} - 80.0f : x;
    x = x > 80.0f ? Lanes{} + 80.0f : x;
    const Lanes shifted = x * 1.44269504f + 12582912.0f;
    const Lanes n = shifted - 12582912.0f;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)(((Whole)shifted - (0x4b400000 - 127)) << 23);
}

// Near zero by its series: there 1 - 2 / (1 + e^2x) would lose what is small.
inline Lanes hyperbolic_tangent(Lanes x) {
    const Lanes y = x * x;
    Lanes series = y * (-1382.0f / 155925) + 62.0f / 2835;
    series = y * (y * series - 17.0f / 315) + 2.0f / 15;
    series = x + x * y * (y * series - 1.0f / 3);
    return y < 0.16f ? series : 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}

// Memory of one thread; `at` is null where there was none.
struct Room {
    float* at;
    explicit Room(int64_t count)
        : at(static_cast<float*>(std::aligned_alloc(64, std::max<int64_t>(up(count * 4, 64), 64)))) {}
    ~Room() { std::free(at); }
    Room(const Room&) = delete;
};

// The left side of a product: entry (i, c) at x[i · rows + c · columns].
struct Left {
    const float* x;
    int64_t rows, columns;
};

// M rows of `product` by N vectors, in registers.
template <int64_t M, int64_t N>
inline void part(Left a, const float* w, int64_t ws, int64_t k, float* y, int64_t ys, bool add) {
    Lanes sum[M][N];  // what it is added to comes last: a sum of sums rounds less
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) sum[i][j] = Lanes{};
    for (int64_t c = 0; c < k; ++c) {
        Lanes right[N];
        for (int64_t j = 0; j < N; ++j) right[j] = at(w + c * ws + j * LANES);
        for (int64_t i = 0; i < M; ++i)
            for (int64_t j = 0; j < N; ++j)
                sum[i][j] += a.x[i * a.rows + c * a.columns] * right[j];
    }
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < N; ++j) {
            Lanes& to = at(y + i * ys + j * LANES);
            to = add ? to + sum[i][j] : sum[i][j];
        }
}

// y (m, n) = or += a (m, k) · w (k, n); m in 8s, n in LANES. w's panels of PANEL columns lie `step`
// entries apart for each of their columns: 1 where w is rows, k where it is panels.
void product(Left a, const float* w, int64_t ws, int64_t step, int64_t m, int64_t n, int64_t k,
             float* y, int64_t ys, bool add) {
    int64_t j = 0;
    for (; j + PANEL <= n; j += PANEL)
        for (int64_t i = 0; i < m; i += HIGH)
            part<HIGH, 2>({a.x + i * a.rows, a.rows, a.columns}, w + j * step, ws, k,
                          y + i * ys + j, ys, add);
    if (j < n)
        for (int64_t i = 0; i < m; i += 8)
            part<8, 1>({a.x + i * a.rows, a.rows, a.columns}, w + j * step, ws, k, y + i * ys + j,
                       ys, add);
}

// What one query sees: keys from begin to end, in whole vectors from low to high.
struct Seen {
    int64_t begin, end, low, high;
    Seen(int64_t begin, int64_t end)
        : begin(begin), end(end), low(begin / LANES * LANES), high(up(end, LANES)) {}
    // What of a vector that begins at a key is seen; the rest becomes -inf.
    Lanes of(Lanes x, int64_t key) const {
        Whole place;
        for (int64_t i = 0; i < LANES; ++i) place[i] = int32_t(i);
        const Whole from = Whole{} + int32_t(begin - key), to = Whole{} + int32_t(end - key);
        return (place >= from) & (place < to) ? x : Lanes{} - INFINITY;
    }
    // Zeros for all others of the keys from `from` to `to`.
    void clear(float* s, int64_t from, int64_t to) const {
        for (int64_t j = from; j < begin; ++j) s[j] = 0.0f;
        for (int64_t j = end; j < to; ++j) s[j] = 0.0f;
    }
};

struct Attention : Asked<float> {
    int64_t wide() const { return up(d, LANES); }
    // What a query sees of `count` keys from `key` on, counted from there.
    Seen seen(int64_t query, int64_t key, int64_t count) const {
        const int64_t end = std::clamp<int64_t>(query + 1 - key, 0, count);
        return {std::clamp<int64_t>(first(query) - key, 0, end), end};
    }
};

// `count` rows of d entries, with zeros beside and below them up to (all, wide).
void copy_rows(const float* from, int64_t stride, int64_t count, int64_t all, int64_t d,
               int64_t wide, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(to + i * wide, from + i * stride, d * 4);
        std::memset(to + i * wide + d, 0, (wide - d) * 4);
    }
    std::memset(to + count * wide, 0, (all - count) * wide * 4);
}

// Rows (length, d) as panels: (d, PANEL) each, with zeros for tokens beyond the last.
void lay_panels(const float* from, int64_t stride, int64_t length, int64_t d, float* to) {
    for (int64_t token = 0; token < up(length, PANEL); token += PANEL, to += d * PANEL)
        for (int64_t j = 0; j < PANEL; ++j)
            for (int64_t c = 0; c < d; ++c)
                to[c * PANEL + j] = token + j < length ? from[(token + j) * stride + c] : 0.0f;
}

// Products of queries and keys, scaled and capped.
inline Lanes score(const Attention& a, Lanes x) {
    x *= a.scale;
    return a.cap > 0.0f ? a.cap * hyperbolic_tangent(x / a.cap) : x;
}

// Scores of one query to e^(score - the largest); gives the largest, and the sum.
inline float weigh(const Attention& a, const Seen& seen, int64_t head, float* s, float& total) {
    const float sink = a.sinks ? a.sinks[head] : -INFINITY;
    Lanes most = Lanes{} - INFINITY, sum{};
    for (int64_t j = seen.low; j < seen.high; j += LANES) {
        const Lanes x = seen.of(score(a, at(s + j)), j);
        at(s + j) = x;
        most = x > most ? x : most;
    }
    float top = sink;
    for (int64_t i = 0; i < LANES; ++i) top = std::max(top, most[i]);
    for (int64_t j = seen.low; j < seen.high; j += LANES) {
        const Lanes e = exponential(at(s + j) - top);
        at(s + j) = e;
        sum += e;
    }
    total = a.sinks ? exponential(sink - top) : 0.0f;
    for (int64_t i = 0; i < LANES; ++i) total += sum[i];
    return top;
}

// out (tokens, heads, d), norms (2, heads, tokens): the largest score and 1 / the sum of
// e^(score - largest). Whether there was memory.
bool forward(const Attention& a, float* out, float* norms, int threads) {
    const int64_t most = longest(a, PANEL), d = a.d, wide = a.wide();
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Flushing flushing;
        const Room keys(most * d), values(most * wide), x(QUERIES * wide), scores(QUERIES * most);
        const Room sums(QUERIES * wide);
        whole = keys.at && values.at && x.at && scores.at && sums.at;
#pragma omp for schedule(dynamic)
        for (int64_t number = 0; number < a.documents * a.heads; ++number) {
            if (!whole) continue;
            const Task t = task_of(a, number);
            lay_panels(a.k.row(t.key, t.start), a.k.ts, t.length, d, keys.at);
            copy_rows(a.v.row(t.key, t.start), a.v.ts, t.length, up(t.length, PANEL), d, wide,
                      values.at);
            for (int64_t query = 0; query < t.length; query += QUERIES) {
                const int64_t high = std::min(QUERIES, t.length - query);
                const int64_t from = a.first(query) / PANEL * PANEL, to = up(query + high, PANEL);
                copy_rows(a.q.row(t.head, t.start + query), a.q.ts, high, QUERIES, d, wide, x.at);
                product({x.at, wide, 1}, keys.at + from * d, PANEL, d, up(high, 8), to - from, d,
                        scores.at + from, most, false);
                float factors[QUERIES];
                for (int64_t i = 0; i < up(high, 8); ++i) {
                    float *row = scores.at + i * most + from, sum;
                    const Seen seen = a.seen(query + i, from, i < high ? to - from : 0);
                    if (i < high) {
                        const int64_t place = t.head * a.tokens + t.start + query + i;
                        norms[place] = weigh(a, seen, t.head, row, sum);
                        norms[a.heads * a.tokens + place] = factors[i] = 1.0f / sum;
                    }
                    seen.clear(row, 0, to - from);
                }
                product({scores.at + from, most, 1}, values.at + from * wide, wide, 1, up(high, 8),
                        wide, to - from, sums.at, wide, false);
                for (int64_t i = 0; i < high; ++i) {
                    float* y = out + ((t.start + query + i) * a.heads + t.head) * d;
                    for (int64_t c = 0; c < d; ++c) y[c] = sums.at[i * wide + c] * factors[i];
                }
            }
        }
    }
    return whole;
}

// One thread's memory on the way back.
struct Desk {
    const Room keys, turned, values, key_sums, value_sums, x, g, sums, p, s;
    Desk(int64_t most, int64_t d) : Desk(most, d, up(d, LANES)) {}
    Desk(int64_t most, int64_t d, int64_t wide)
        : keys(most * d), turned(most * wide), values(most * d), key_sums(most * wide),
          value_sums(most * wide), x(QUERIES * wide), g(QUERIES * wide), sums(QUERIES * wide),
          p(QUERIES * KEYS), s(QUERIES * KEYS) {}
    bool whole() const {
        return keys.at && turned.at && values.at && key_sums.at && value_sums.at && x.at && g.at &&
               sums.at && p.at && s.at;
    }
};

inline float inner(const float* x, const float* y, int64_t d) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) sum += x[i] * y[i];
    return sum;
}

// Scores and upstream of one query to its probabilities and the gradients of scores, in place.
inline void slopes_of(const Attention& a, const Seen& seen, float* p, float* s, float top,
                      float share, float own) {
    const float slight = a.cap > 0.0f ? 1.0f / a.cap : 0.0f;
    for (int64_t j = seen.low; j < seen.high; j += LANES) at(p + j) = score(a, at(p + j));
    for (int64_t j = seen.low; j < seen.high; j += LANES) {
        const Lanes x = at(p + j), bend = x * slight, e = exponential(x - top) * share;
        at(p + j) = e;
        at(s + j) = e * (at(s + j) - own) * (a.scale * (1.0f - bend * bend));
    }
}

void back_of(const Attention& a, const Gradients<float>& to, const Task& t, Desk& m) {
    const int64_t d = a.d, wide = a.wide(), stride = a.heads * d, all = up(t.length, PANEL);
    lay_panels(a.k.row(t.key, t.start), a.k.ts, t.length, d, m.keys.at);
    lay_panels(a.v.row(t.key, t.start), a.v.ts, t.length, d, m.values.at);
    copy_rows(a.k.row(t.key, t.start), a.k.ts, t.length, all, d, wide, m.turned.at);
    std::memset(m.key_sums.at, 0, all * wide * 4);
    std::memset(m.value_sums.at, 0, all * wide * 4);
    for (int64_t query = 0; query < t.length; query += QUERIES) {
        const int64_t high = std::min(QUERIES, t.length - query), rows = up(high, 8);
        const int64_t from = a.first(query) / PANEL * PANEL, end = up(query + high, PANEL);
        const int64_t place = ((t.start + query) * a.heads + t.head) * d;
        const float* tops = to.norms + t.head * a.tokens + t.start + query;
        const float* shares = tops + a.heads * a.tokens;
        copy_rows(a.q.row(t.head, t.start + query), a.q.ts, high, QUERIES, d, wide, m.x.at);
        copy_rows(to.grad + place, stride, high, QUERIES, d, wide, m.g.at);
        float own[QUERIES];
        for (int64_t i = 0; i < high; ++i)
            own[i] = inner(m.g.at + i * wide, to.out + place + i * stride, d);
        for (int64_t key = from; key < end; key += KEYS) {
            const int64_t count = std::min(KEYS, end - key);
            product({m.x.at, wide, 1}, m.keys.at + key * d, PANEL, d, rows, count, d, m.p.at, KEYS,
                    false);
            product({m.g.at, wide, 1}, m.values.at + key * d, PANEL, d, rows, count, d, m.s.at,
                    KEYS, false);
            for (int64_t i = 0; i < rows; ++i) {
                float *p = m.p.at + i * KEYS, *s = m.s.at + i * KEYS;
                const Seen seen = a.seen(query + i, key, i < high ? count : 0);
                const int64_t row = std::min(i, high - 1);
                slopes_of(a, seen, p, s, tops[row], shares[row], own[row]);
                seen.clear(p, 0, count);
                seen.clear(s, 0, count);
            }
            product({m.s.at, KEYS, 1}, m.turned.at + key * wide, wide, 1, rows, wide, count,
                    m.sums.at, wide, key > from);
            product({m.s.at, 1, KEYS}, m.x.at, wide, 1, count, wide, rows,
                    m.key_sums.at + key * wide, wide, true);
            product({m.p.at, 1, KEYS}, m.g.at, wide, 1, count, wide, rows,
                    m.value_sums.at + key * wide, wide, true);
        }
        for (int64_t i = 0; i < high; ++i)
            std::memcpy(to.q + place + i * stride, m.sums.at + i * wide, d * 4);
    }
    for (int64_t i = 0; i < t.length; ++i) {
        const int64_t part = (t.head * a.tokens + t.start + i) * d;
        std::memcpy(to.parts_k + part, m.key_sums.at + i * wide, d * 4);
        std::memcpy(to.parts_v + part, m.value_sums.at + i * wide, d * 4);
    }
}

struct Nothing {
    Nothing() {}
};

}  // namespace

extern "C" {

// 0: no memory.
int attend_fp32(ATTENTION(float), float* out, float* norms, int threads) {
    return forward(Attention{THE_ATTENTION}, out, norms, threads);
}

int attend_back_fp32(ATTENTION(float), const float* out, const float* grad, const float* norms,
                     float* grad_q, float* grad_k, float* grad_v, float* parts_k, float* parts_v,
                     int threads) {
    const Attention a{THE_ATTENTION};
    const Gradients<float> to{out, grad, norms, grad_q, grad_k, grad_v, parts_k, parts_v};
    return all_back<Flushing, Desk>(a, to, longest(a, PANEL), threads,
                                   [&](const Task& task, Desk& desk) { back_of(a, to, task, desk); });
}
}
