// Bodies of the codes in kernels/nf4.py and kernels/int8.py: unpacking, and products of bytes.
//
// As in bodies.cpp: one pass over memory, strides in elements. Knows no torch.

#include "numbers.hpp"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// To the nearest whole number, ties to even.
inline int8_t whole(float x) { return int8_t(int32_t(as_bits(x + 12582912.0f) - 0x4b400000u)); }

// 32 bytes, 64 numbers.
inline void write_levels(const uint8_t* bytes, const float* numbers, float* at) {
    for (int i = 0; i < 32; ++i) {
        at[2 * i] = numbers[bytes[i] >> 4];
        at[2 * i + 1] = numbers[bytes[i] & 15];
    }
}

inline void write_levels(const uint8_t* bytes, const float* numbers, bfloat* at) {
    bfloat rounded[16];
    for (int i = 0; i < 16; ++i) put(rounded + i, numbers[i]);
#ifdef __AVX512F__
    // a table of 16 numbers is one register: two look-ups give the halves of 16 pairs
    const __m512i table =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded)));
    for (int i = 0; i < 32; i += 16) {
        const __m512i both =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)));
        const __m512i first = _mm512_permutexvar_epi32(_mm512_srli_epi32(both, 4), table);
        const __m512i second = _mm512_permutexvar_epi32(both, table);  // reads the lowest four bits
        _mm512_storeu_si512(at + 2 * i, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
#else
    for (int i = 0; i < 32; ++i) {
        at[2 * i] = rounded[bytes[i] >> 4];
        at[2 * i + 1] = rounded[bytes[i] & 15];
    }
#endif
}

// Two levels a byte, the first one high, times the scale of their block of 64: out (rows, width).
// Strides in bytes of packed, in scales of scales.
template <class T>
void nf4_unpack(const uint8_t* packed, const float* scales, const float* levels, T* out,
                int64_t rows, int64_t width, int64_t ps, int64_t ss, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t block = 0; block < width / 64; ++block) {
            const uint8_t* bytes = packed + row * ps + block * 32;
            const float scale = scales[row * ss + block];
            float numbers[16];
            for (int i = 0; i < 16; ++i) numbers[i] = levels[i] * scale;
            T* at = out + row * width + block * 64;
            write_levels(bytes, numbers, at);
        }
    }
}

// A row of x, or x · fold, in fp32; its largest size and its sum of squares. Each form is a loop of
// its own: with the choice inside it, compilers leave the loop scalar.
template <bool FOLD, class T>
void read(const T* x, const float* fold, float* p, int64_t columns, float& peak, float& sum) {
    float largest = 0.0f, squares = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : squares)
    for (int64_t i = 0; i < columns; ++i) {
        const float v = FOLD ? wide(x[i]) * fold[i] : wide(x[i]);
        const float size = v < 0.0f ? -v : v;
        p[i] = v;
        largest = size > largest ? size : largest;
        squares += v * v;
    }
    peak = largest, sum = squares;
}

// Codes (rows, columns) of x · fold: whole numbers of steps of peak / levels a row, with a chance
// of a table of so many entries, from another place each row, added before rounding where given.
// ratio: peak over root mean square.
template <class T>
void quantise(const T* x, const float* fold, const float* chance, int8_t* codes, float* scale,
              float* ratio, int64_t rows, int64_t columns, int64_t xs, int64_t levels,
              int64_t entries, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> held(columns);
        float* p = held.data();
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            const T* xi = x + row * xs;
            int8_t* ci = codes + row * columns;
            float peak = 0.0f, sum = 0.0f;
            if (fold)
                read<true>(xi, fold, p, columns, peak, sum);
            else
                read<false>(xi, fold, p, columns, peak, sum);
            peak = sum == sum ? (peak > 1e-30f ? peak : 1e-30f) : sum;  // not a number stays one
            const float mean = std::sqrt(sum / float(columns));
            ratio[row] = peak / (mean > 1e-30f ? mean : 1e-30f);
            scale[row] = peak / float(levels);
            const float inverse = 1.0f / scale[row];
            const float* ni = chance ? chance + row * 7919 % (entries - columns) : nullptr;
            if (ni) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) ci[i] = whole(p[i] * inverse + ni[i]);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) ci[i] = whole(p[i] * inverse);
            }
        }
    }
}

// y = or += products · row_scale · column_scale + bias; y (rows, columns) with a stride.
template <class T>
void scaled(const int32_t* products, const float* row_scale, const float* column_scale,
            const float* bias, T* y, int64_t rows, int64_t columns, int64_t ys, int64_t sum,
            int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t* pi = products + row * columns;
        T* yi = y + row * ys;
        const float s = row_scale[row];
        if (column_scale && !sum) {
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i)
                put(yi + i, float(pi[i]) * s * column_scale[i] + (bias ? bias[i] : 0.0f));
        } else if (sum) {
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) put(yi + i, wide(yi[i]) + float(pi[i]) * s);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) put(yi + i, float(pi[i]) * s);
        }
    }
}

}  // namespace

#define DOORS(T, NAME)                                                                         \
    void nf4_unpack_##NAME(const uint8_t* packed, const float* scales, const float* levels,        \
                           T* out, int64_t rows, int64_t width, int64_t ps, int64_t ss,            \
                           int threads) {                                                          \
        nf4_unpack(packed, scales, levels, out, rows, width, ps, ss, threads);                     \
    }                                                                                              \
    void quantise_##NAME(const T* x, const float* fold, const float* chance, int8_t* codes,        \
                         float* scale, float* ratio, int64_t rows, int64_t columns, int64_t xs,    \
                         int64_t levels, int64_t entries, int threads) {                           \
        quantise(x, fold, chance, codes, scale, ratio, rows, columns, xs, levels, entries,         \
                 threads);                                                                         \
    }                                                                                              \
    void scaled_##NAME(const int32_t* products, const float* row_scale, const float* column_scale, \
                       const float* bias, T* y, int64_t rows, int64_t columns, int64_t ys,         \
                       int64_t sum, int threads) {                                                 \
        scaled(products, row_scale, column_scale, bias, y, rows, columns, ys, sum, threads);       \
    }

extern "C" {
DOORS(bfloat, bf16)
DOORS(float, fp32)
}
