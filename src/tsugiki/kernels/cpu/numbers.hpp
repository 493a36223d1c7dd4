// What the compiled bodies share: bfloat16 and float in and out, and e^x. Knows no operation.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// While it lives, this thread takes numbers below 1e-38 for zero. Weights of attention that is sure of
// itself are so small, and gates that are shut; processors take a hundred times longer over each.
class Flushing {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();

   public:
    Flushing() { _mm_setcsr(before | 0x8040); }
    ~Flushing() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

   public:
    Flushing() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | (1u << 24)));
    }
    ~Flushing() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
   public:
    Flushing() {}
#endif
};

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct bfloat {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float wide(float x) { return x; }
inline float wide(bfloat x) { return as_float(uint32_t(x.bits) << 16); }

inline void put(float* at, float x) { *at = x; }
inline void put(bfloat* at, float x) {  // to nearest, ties to even; not a number stays one
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    at->bits = uint16_t(x == x ? rounded : 0x7fc0u);
}

// e^x, relative error about 1e-7 (Cephes' expf). Beyond 80 it stands still: 1 / e^88 would be a
// subnormal number, and processors take a hundred times longer over each of those.
inline float exponential(float x) {
    x = x < -80.0f ? -80.0f : x;
    x = x > 80.0f ? 80.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the sum is rounded to a whole
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float((as_bits(shifted) - 0x4b400000u + 127u) << 23);
}

inline float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

}  // namespace
