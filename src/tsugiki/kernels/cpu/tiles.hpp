// What products of 32 rows times 32 columns share: a matrix laid out in tiles, and one such block of
// sums, in tile registers (Intel AMX) or, on CPUs with bfloat16 in vectors alone (AMD from Zen 4 on),
// in 16 vector registers at a time. Knows no product and no torch.

#pragma once

#include "numbers.hpp"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define TILES 1
#include <immintrin.h>
#if defined(__linux__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define TILE_REGISTERS 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <cstdlib>

#ifdef TILES
namespace {

constexpr int64_t SIDE = 32;      // rows and columns of one register block: 2 × 2 tiles
constexpr int64_t DEPTH = 64;     // bytes of K in a tile's row
constexpr int64_t TILE = 1024;    // bytes
constexpr int64_t MOST_K = 1280;  // bytes of K in one pass: 32 rows of x fit into the first cache

// The first so many of 16.
inline __mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : uint16_t((1u << count) - 1);
}

// 16 rows of 16 dwords, transposed.
inline void transpose(const __m512i* in, __m512i* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        out[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        out[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

// One tile of W from its rows (n, k): dwords of K become rows of the tile.
template <class E>
inline void lay_rows(const E* w, int64_t stride, int64_t rows, char* tile) {
    __m512i in[16], out[16];
    for (int64_t i = 0; i < 16; ++i)
        in[i] = i < rows ? _mm512_loadu_si512(w + i * stride) : _mm512_setzero_si512();
    transpose(in, out);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, out[i]);
}

inline __m512i widened(const int8_t* w, __mmask16 mask) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w));
}
inline __m512i widened(const bfloat* w, __mmask16 mask) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w));
}

// One tile from rows (k, n): entries of four rows of bytes, or two of bfloats, side by side.
template <class E>
inline void lay_columns(const E* w, int64_t stride, int64_t columns, char* tile) {
    const __mmask16 mask = first(columns);
    for (int64_t i = 0; i < 16; ++i) {
        __m512i all = widened(w, mask);
        w += stride;
#pragma GCC unroll 3
        for (unsigned j = sizeof(E); j < 4; j += sizeof(E), w += stride)
            all = _mm512_or_si512(all, _mm512_slli_epi32(widened(w, mask), 8 * j));
        _mm512_store_si512(tile + 64 * i, all);
    }
}

// A matrix as it is stored: (n, k), or (k, n) where `across`; stride in entries.
template <class E>
struct Stored {
    const E* at;
    int64_t n, stride;
    bool across;
};

// Tiles of its columns n from `left` on and of K from `from` to `end`, panel after panel.
template <class E>
void lay_block(const Stored<E>& w, int64_t left, int64_t panels, int64_t from, int64_t end,
               char* tile) {
    for (int64_t column = left; column < left + panels * SIDE; column += SIDE)
        for (int64_t k = from; k < end; k += DEPTH / int64_t(sizeof(E)))
            for (int64_t half = column; half < column + SIDE; half += 16, tile += TILE) {
                const int64_t count = w.n - half, first = count > 0 ? half : 0;
                if (w.across)
                    lay_columns(w.at + k * w.stride + first, w.stride, count, tile);
                else
                    lay_rows(w.at + first * w.stride + k, w.stride, count, tile);
            }
}

#ifdef TILE_REGISTERS
// A thread's tile registers, as long as it lives.
struct Registers {
    struct alignas(64) Shape {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Flushing flushing;
    Registers() {
        const Shape shape;
        _tile_loadconfig(&shape);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
};

inline void multiply_tiles(const int8_t*) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
}

inline void multiply_tiles(const bfloat*) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// to (32, 32) = sums + x (32, depth) · tiles; meanwhile something else is written, by rows.
template <class E, class Meanwhile>
void multiply(const E* rows, int64_t stride, const char* tile, int64_t depth, const char* sums,
              char* to, Meanwhile& meanwhile) {
    if (sums) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE, 64);
        _tile_loadd(2, sums + 2 * TILE, 64);
        _tile_loadd(3, sums + 3 * TILE, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char* x = reinterpret_cast<const char*>(rows);
    const int64_t share = (SIDE * DEPTH + depth - 1) / depth;
    for (int64_t at = 0; at < depth; at += DEPTH, tile += 2 * TILE) {
        _tile_loadd(4, x + at, stride);
        _tile_stream_loadd(6, tile, 64);
        _tile_loadd(5, x + at + 16 * stride, stride);
        _tile_stream_loadd(7, tile + TILE, 64);
        multiply_tiles(rows);
        meanwhile.write(share);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + TILE, 64);
    _tile_stored(2, to + 2 * TILE, 64);
    _tile_stored(3, to + 3 * TILE, 64);
}

#else
struct Registers {
    const Flushing flushing;
};

inline __m512bh pair(const char* x) {
    int32_t two;
    std::memcpy(&two, x, 4);
    return (__m512bh)_mm512_set1_epi32(two);
}

// to (32, 32) = sums + x (32, depth) · tiles, eight rows at a time; what else there is comes first.
template <class Meanwhile>
void multiply(const bfloat* rows, int64_t stride, const char* tile, int64_t depth,
              const char* sums, char* to, Meanwhile& meanwhile) {
    meanwhile.write(SIDE);
    for (int64_t row = 0; row < SIDE; row += 8) {
        const int64_t place = row / 16 * 2 * TILE + row % 16 * 64;
        const char* x = reinterpret_cast<const char*>(rows) + row * stride;
        const char* w = tile;
        __m512 some[8][2];
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j)
                some[i][j] = sums ? _mm512_load_ps(sums + place + 64 * i + TILE * j)
                                  : _mm512_setzero_ps();
        for (int64_t at = 0; at < depth; at += DEPTH, w += 2 * TILE)
            for (int64_t k = 0; k < 16; ++k) {  // two of K
                const __m512bh low = (__m512bh)_mm512_load_si512(w + 64 * k);
                const __m512bh high = (__m512bh)_mm512_load_si512(w + 64 * k + TILE);
                for (int i = 0; i < 8; ++i) {
                    const __m512bh two = pair(x + i * stride + at + 4 * k);
                    some[i][0] = _mm512_dpbf16_ps(some[i][0], two, low);
                    some[i][1] = _mm512_dpbf16_ps(some[i][1], two, high);
                }
            }
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 2; ++j) _mm512_store_ps(to + place + 64 * i + TILE * j, some[i][j]);
    }
}
#endif

// 16 sums of a row among those of a strip of 32 rows, panel after panel of 32 columns.
inline float* piece(char* strip, int64_t row, int64_t column) {
    return reinterpret_cast<float*>(strip + column / SIDE * 4 * TILE + row / 16 * 2 * TILE +
                                    column % SIDE / 16 * TILE + row % 16 * 64);
}

// e^x to 4e-7 of itself, for x up to zero; not a number stays one. 2^n · e^r with n the nearest whole
// number, e^r by a polynomial fitted to half of ln 2 on both sides (largest error 1.1e-7).
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-80.0f), x);
    const __m512 whole = _mm512_set1_ps(12582912.0f);  // 1.5 · 2^23: adding it rounds
    const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), whole), whole);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), x);
    __m512 p = _mm512_set1_ps(8.31253e-3f);
    for (const float term : {4.189017e-2f, 1.6667115e-1f, 4.9999231e-1f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(p, n);
}

// For products that nothing else goes on beside.
struct Nothing {
    void write(int64_t) {}
};

struct Memory {
    explicit Memory(int64_t bytes) : at(static_cast<char*>(std::aligned_alloc(64, bytes))) {}
    ~Memory() { std::free(at); }
    Memory(const Memory&) = delete;
    char* at;
};


// Equal parts of `whole`, each a multiple of `unit` and about `most` at most.
inline int64_t part(int64_t whole, int64_t most, int64_t unit) {
    const int64_t count = std::max<int64_t>(1, (whole + most - 1) / most);
    return up((whole + count - 1) / count, unit);
}

// Which entries of a wide operand count: rows share a place in the table by parts.
struct Mask {
    const uint16_t* bits;   // null: all
    const int64_t* places;  // of each part of the rows, in entries
    int64_t rows;           // of one part
    int64_t width;

    __mmask32 kept(int64_t row, int64_t column) const {
        if (!bits) return 0xffffffff;
        const int64_t at = places[row / rows] + row % rows * width + column;
        uint32_t word;
        std::memcpy(&word, bits + at / 16, 4);
        return word;
    }
};

// A thin matrix (width, rank), as it is stored, with zeros up to a rank in 32s; room for that.
inline Stored<bfloat> padded(const Stored<bfloat>& b, int64_t width, int64_t rank, char* room) {
    const int64_t deep = up(rank, SIDE), stride = b.across ? width : deep;
    const int64_t lines = b.across ? rank : width, wide = b.across ? width : rank;
    bfloat* to = reinterpret_cast<bfloat*>(room);
    std::memset(room, 0, deep * width * 2);
    for (int64_t i = 0; i < lines; ++i) std::memcpy(to + i * stride, b.at + i * b.stride, wide * 2);
    return {to, width, stride, b.across};
}

}  // namespace
#endif
