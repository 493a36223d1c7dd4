// Elementwise bodies of kernels/ in one pass over memory, for bfloat16 and float, on a CPU.
//
// Each function is the body of the operation of the same name in kernels/*.py, whose plain torch
// form needs several passes. Sums and functions are fp32, and each result is rounded once. Loops
// are plain C++ that a compiler turns into vector code. Strides are in elements. Knows no torch.

#include "numbers.hpp"

namespace {

// An activation by its inner function, computed once for value and slope.
struct Silu {
    static float inner(float e) { return 1.0f / (1.0f + exponential(-e)); }
    static float value(float e, float s) { return e * s; }
    static float slope(float e, float s) { return s * (1.0f + e * (1.0f - s)); }
};

struct GeluTanh {
    static float inner(float e) {
        return hyperbolic_tangent(0.7978845608f * (e + 0.044715f * e * e * e));
    }
    static float value(float e, float t) { return 0.5f * e * (1.0f + t); }
    static float slope(float e, float t) {
        const float inside = 0.7978845608f * (1.0f + 3.0f * 0.044715f * e * e);
        return 0.5f * (1.0f + t) + 0.5f * e * (1.0f - t * t) * inside;
    }
};

template <class T, class A>
void gate(const T* e, const T* g, T* h, int64_t rows, int64_t columns, int64_t es, int64_t gs,
          int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const T *ei = e + row * es, *gi = g ? g + row * gs : nullptr;
            T* hi = h + row * columns;
            if (gi) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    const float ew = wide(ei[i]);
                    put(hi + i, A::value(ew, A::inner(ew)) * wide(gi[i]));
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    const float ew = wide(ei[i]);
                    put(hi + i, A::value(ew, A::inner(ew)));
                }
            }
        }
    }
}

// dg may be dh itself: each place is read before it is written.
template <class T, class A>
void gate_back(const T* dh, const T* e, const T* g, T* h, T* de, T* dg, int64_t rows,
               int64_t columns, int64_t es, int64_t gs, int64_t des, int64_t dgs, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const T *di = dh + row * columns, *ei = e + row * es, *gi = g ? g + row * gs : nullptr;
            T *hi = h ? h + row * columns : nullptr, *dei = de + row * des;
            T* dgi = g ? dg + row * dgs : nullptr;
            if (gi && hi) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    const float upstream = wide(di[i]), factor = wide(gi[i]);
                    const float ew = wide(ei[i]), inner = A::inner(ew), value = A::value(ew, inner);
                    put(hi + i, value * factor);
                    put(dei + i, upstream * factor * A::slope(ew, inner));
                    put(dgi + i, upstream * value);
                }
            } else if (gi) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    const float upstream = wide(di[i]), factor = wide(gi[i]);
                    const float ew = wide(ei[i]), inner = A::inner(ew);
                    put(dei + i, upstream * factor * A::slope(ew, inner));
                    put(dgi + i, upstream * A::value(ew, inner));
                }
            } else {
                for (int64_t i = 0; i < columns; ++i) {
                    const float ew = wide(ei[i]), inner = A::inner(ew);
                    if (hi) put(hi + i, A::value(ew, inner));
                    put(dei + i, wide(di[i]) * A::slope(ew, inner));
                }
            }
        }
    }
}

// One row at a time through a scratch of fp32. Where `slopes`, x becomes
// factor · d loss / d x with the target's entry left out and put into `own` instead.
template <class T>
void softmax_rows(T* x, const int64_t* targets, float* losses, float* own, int64_t rows,
                  int64_t columns, float scale, float cap, float factor, int slopes, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
        std::vector<float> held(columns);
        float* p = held.data();
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            T* xi = x + row * columns;
            const int64_t target = targets[row];
            float best = -INFINITY, sum = 0.0f;
            if (cap > 0.0f) {
#pragma omp simd reduction(max : best)
                for (int64_t i = 0; i < columns; ++i) {
                    const float u = cap * hyperbolic_tangent(wide(xi[i]) * scale / cap);
                    p[i] = u;
                    best = u > best ? u : best;
                }
            } else {
#pragma omp simd reduction(max : best)
                for (int64_t i = 0; i < columns; ++i) {
                    const float u = wide(xi[i]) * scale;
                    p[i] = u;
                    best = u > best ? u : best;
                }
            }
            const float picked = p[target];
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < columns; ++i) {
                const float v = exponential(p[i] - best);
                p[i] = v;
                sum += v;
            }
            losses[row] = std::log(sum) - (picked - best);
            if (!slopes) continue;
            const float part = factor * scale / sum;
            float slope_at = 1.0f;
            if (cap > 0.0f) {
                slope_at = 1.0f - (picked / cap) * (picked / cap);
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) {
                    const float t = hyperbolic_tangent(wide(xi[i]) * scale / cap);
                    put(xi + i, p[i] * part * (1.0f - t * t));
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) put(xi + i, p[i] * part);
            }
            own[row] = (p[target] * part - factor * scale) * slope_at;
            put(xi + target, 0.0f);
        }
    }
}

template <class T>
void norm_rows(const T* x, const T* weight, T* out, float* inverse, int64_t rows, int64_t columns,
               float eps, float offset, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const T* xi = x + row * columns;
            T* oi = out + row * columns;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < columns; ++i) sum += wide(xi[i]) * wide(xi[i]);
            const float r = 1.0f / std::sqrt(sum / float(columns) + eps);
            inverse[row] = r;
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i)
                put(oi + i, wide(xi[i]) * r * (wide(weight[i]) + offset));
        }
    }
}

template <class T>
void norm_rows_back(const T* grad, const T* x, const T* weight, const float* inverse, T* out,
                    int64_t rows, int64_t columns, float offset, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const T *xi = x + row * columns, *gi = grad + row * columns;
            T* oi = out + row * columns;
            const float r = inverse[row];
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < columns; ++i)
                sum += wide(xi[i]) * r * wide(gi[i]) * (wide(weight[i]) + offset);
            const float mean = sum / float(columns);
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i)
                put(oi + i,
                    (wide(gi[i]) * (wide(weight[i]) + offset) - wide(xi[i]) * r * mean) * r);
        }
    }
}

// Strides: of a token and of a head, for x and for out. cosines, sines (tokens, 2·half).
template <class T>
void turn(const T* x, const T* cosines, const T* sines, T* out, int64_t tokens, int64_t heads,
          int64_t width, int64_t half, int64_t xt, int64_t xh, int64_t ot, int64_t oh,
          float direction, int threads) {
    const int64_t swapped = direction < 0 ? half : 0;  // the transpose of the same matrix
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t token = 0; token < tokens; ++token) {
            const T *c = cosines + token * 2 * half, *s = sines + token * 2 * half;
            for (int64_t head = 0; head < heads; ++head) {
                const T* xi = x + token * xt + head * xh;
                T* oi = out + token * ot + head * oh;
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    const float one = wide(xi[i]), two = wide(xi[half + i]);
                    put(oi + i, one * wide(c[i]) - direction * two * wide(s[i + swapped]));
                    put(oi + half + i,
                        two * wide(c[half + i]) + direction * one * wide(s[half + i - swapped]));
                }
                for (int64_t i = 2 * half; i < width; ++i) oi[i] = xi[i];
            }
        }
    }
}

// out = x · mask · scale, or onto x where `sum`: mask's bits begin at a multiple of 16.
template <class T>
void dropped(const T* x, const uint16_t* mask, T* out, int64_t count, float scale, int sum,
             int threads) {
    const int64_t words = count / 16;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Flushing flushing;
#pragma omp for
        for (int64_t word = 0; word < words; ++word) {
            const uint32_t bits = mask[word];
            const T* xi = x + word * 16;
            T* oi = out + word * 16;
#pragma omp simd
            for (int i = 0; i < 16; ++i) {
                const float kept = (bits >> i) & 1u ? wide(xi[i]) * scale : 0.0f;
                put(oi + i, sum ? wide(oi[i]) + kept : kept);
            }
        }
    }
    const Flushing flushing;
    for (int64_t i = words * 16; i < count; ++i) {
        const float kept = (mask[words] >> (i - words * 16)) & 1u ? wide(x[i]) * scale : 0.0f;
        put(out + i, sum ? wide(out[i]) + kept : kept);
    }
}

}  // namespace

#define DOORS(T, NAME)                                                                             \
    void gate_##NAME(const T* e, const T* g, T* h, int64_t rows, int64_t columns, int64_t es,      \
                     int64_t gs, int64_t kind, int threads) {                                          \
        (kind ? gate<T, GeluTanh> : gate<T, Silu>)(e, g, h, rows, columns, es, gs, threads);       \
    }                                                                                              \
    void gate_back_##NAME(const T* dh, const T* e, const T* g, T* h, T* de, T* dg, int64_t rows,   \
                          int64_t columns, int64_t es, int64_t gs, int64_t des, int64_t dgs,       \
                          int64_t kind, int threads) {                                                 \
        (kind ? gate_back<T, GeluTanh> : gate_back<T, Silu>)(dh, e, g, h, de, dg, rows, columns,   \
                                                             es, gs, des, dgs, threads);           \
    }                                                                                              \
    void softmax_rows_##NAME(T* x, const int64_t* targets, float* losses, float* own,              \
                             int64_t rows, int64_t columns, float scale, float cap, float factor,  \
                             int64_t slopes, int threads) {                                            \
        softmax_rows(x, targets, losses, own, rows, columns, scale, cap, factor, slopes, threads); \
    }                                                                                              \
    void norm_rows_##NAME(const T* x, const T* weight, T* out, float* inverse, int64_t rows,       \
                          int64_t columns, float eps, float offset, int threads) {                 \
        norm_rows(x, weight, out, inverse, rows, columns, eps, offset, threads);                   \
    }                                                                                              \
    void norm_rows_back_##NAME(const T* grad, const T* x, const T* weight, const float* inverse,   \
                               T* out, int64_t rows, int64_t columns, float offset, int threads) { \
        norm_rows_back(grad, x, weight, inverse, out, rows, columns, offset, threads);             \
    }                                                                                              \
    void turn_##NAME(const T* x, const T* c, const T* s, T* out, int64_t tokens, int64_t heads,    \
                     int64_t width, int64_t half, int64_t xt, int64_t xh, int64_t ot, int64_t oh,  \
                     float direction, int threads) {                                               \
        turn(x, c, s, out, tokens, heads, width, half, xt, xh, ot, oh, direction, threads);        \
    }                                                                                              \
    void dropped_##NAME(const T* x, const uint16_t* mask, T* out, int64_t count, float scale,      \
                        int64_t sum, int threads) {                                                    \
        dropped(x, mask, out, count, scale, sum, threads);                                         \
    }

extern "C" {
DOORS(bfloat, bf16)
DOORS(float, fp32)
}
