// Matrix products in tiles: y (M, N) = x (M, K) · W in bfloat16 and, in tile registers, of byte codes
// times the scales of their rows and columns; with a bias and a term of low rank.
//
// W is read as it is stored, (N, K) or (K, N), and laid out for the tiles one block at a time, so no
// second copy of it is kept. Sums are fp32 or int32 from the first to the last of K, never leave the
// core's own caches, and do not depend on the number of threads. Three things make it fast in tile
// registers: 32 rows of x and no more than fits stay in the first cache while W's tiles stream past
// it (loads with a hint that they will not be needed again), each block is one register load a
// multiplication, and finished sums are rounded and written while the tiles work on the next ones.
// Knows no torch.

#include "tiles.hpp"

#ifdef TILES
namespace {

constexpr int64_t MOST_N = 512;   // columns of a block
constexpr int64_t MOST_M = 1024;  // rows of a block
constexpr int64_t ROOM = 1 << 20; // bytes of a block's tiles at a time: half of the second cache

inline __m512 real(const int8_t*, const char* sums) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(sums));
}
inline __m512 real(const bfloat*, const char* sums) { return _mm512_load_ps(sums); }

// 32 sums, or the first of them, into y or onto it.
inline void put_row(bfloat* at, __m512 low, __m512 high, __mmask32 mask, bool add) {
    if (add) {
        const __m512i old = _mm512_maskz_loadu_epi16(mask, at);
        const __m512i l = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(old));
        const __m512i h = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1));
        low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(l, 16)));
        high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(h, 16)));
    }
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (mask == 0xffffffff)
        _mm512_storeu_si512(at, rounded);
    else
        _mm512_mask_storeu_epi16(at, mask, rounded);
}

inline void put_row(float* at, __m512 low, __m512 high, __mmask32 mask, bool add) {
    const __mmask16 l = uint16_t(mask), h = uint16_t(mask >> 16);
    if (add) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(l, at));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(h, at + 16));
    }
    _mm512_mask_storeu_ps(at, l, low);
    _mm512_mask_storeu_ps(at + 16, h, high);
}

// A product with a low rank that is added: scale · mask(s (m, rank) · b (rank, n)).
struct Term {
    const bfloat* s;  // null: none
    Stored<bfloat> b;
    int64_t rank, ss;
    float scale;
    Mask mask;
};

// y (m, n) = x (m, k) · W, times rows · columns, + bias + term; strides in entries; none of m, n, k
// is zero.
template <class E, class Y>
struct Product {
    const E* x;
    Stored<E> w;
    const float *rows, *columns, *bias;  // scales of x's rows and W's columns; each may lack
    Y* y;
    int64_t m, n, k, xs, ys;
    bool add;  // to what is in y
    Term term;
};

// Finished sums of 32 rows and columns on their way into y, a few rows at a time.
template <class E, class Y>
struct Ending {
    const Product<E, Y>& p;
    const char* sums = nullptr;
    char* low_rank = nullptr;  // sums of the term, if any
    int64_t top = 0, left = 0, done = 0, high = 0;
    __mmask32 mask = 0;
    __m512 scales[2], biases[2];

    void begin(const char* from, char* beside, int64_t row, int64_t count, int64_t column) {
        sums = from, low_rank = beside, top = row, left = column, done = 0, high = count;
        mask = first(p.n - column) | uint32_t(first(p.n - column - 16)) << 16;
        for (int i = 0; i < 2; ++i) {
            const __mmask16 some = uint16_t(mask >> 16 * i);
            const int64_t at = column + 16 * i;
            scales[i] = p.columns ? _mm512_maskz_loadu_ps(some, p.columns + at)
                                  : _mm512_set1_ps(1.0f);
            biases[i] =
                p.bias ? _mm512_maskz_loadu_ps(some, p.bias + at) : _mm512_setzero_ps();
        }
    }

    void write(int64_t count) {
        for (const int64_t stop = std::min(high, done + count); done < stop; ++done) {
            const char* from = sums + done / 16 * 2 * TILE + done % 16 * 64;
            __m512 low = real(p.x, from), upper = real(p.x, from + TILE);
            if (p.rows) {
                const __m512 scale = _mm512_set1_ps(p.rows[top + done]);
                low = _mm512_mul_ps(_mm512_mul_ps(low, scale), scales[0]);
                upper = _mm512_mul_ps(_mm512_mul_ps(upper, scale), scales[1]);
            }
            if (low_rank) {
                const __mmask32 kept = p.term.mask.kept(top + done, left);
                const __m512 factor = _mm512_set1_ps(p.term.scale);
                const float* term = piece(low_rank, done, 0);
                low = _mm512_fmadd_ps(_mm512_maskz_load_ps(uint16_t(kept), term), factor, low);
                term += TILE / 4;
                upper = _mm512_fmadd_ps(_mm512_maskz_load_ps(uint16_t(kept >> 16), term), factor,
                                        upper);
            }
            put_row(p.y + (top + done) * p.ys + left, _mm512_add_ps(low, biases[0]),
                    _mm512_add_ps(upper, biases[1]), mask, p.add);
        }
    }
};

// Whether there was memory for it; y is partly written where not.
template <class E, class Y>
bool multiply_all(const Product<E, Y>& p, int threads) {
    constexpr int64_t size = sizeof(E), per = DEPTH / size;
    const int64_t wide = part(up((p.n + threads - 1) / threads, SIDE), MOST_N, SIDE);
    const int64_t chunk = part(p.k, ROOM / size / wide, per), pass = part(chunk, MOST_K / size, per);
    const int64_t tall = part(p.m, MOST_M, SIDE);
    const int64_t across = (p.n + wide - 1) / wide, down = (p.m + tall - 1) / tall;
    const int64_t deep = p.term.s ? up(p.term.rank, SIDE) : 0;  // of the term, with zeros
    const Memory thin(deep * p.n * 2 + 64), rows(deep * up(p.m, SIDE) * 2 + 64);
    bool whole = thin.at && rows.at;
    if (!whole) return false;
    const bfloat* s = reinterpret_cast<bfloat*>(rows.at);
    Stored<bfloat> b{};
    if (deep) {
        b = padded(p.term.b, p.n, p.term.rank, thin.at);
        std::memset(rows.at, 0, up(p.m, SIDE) * deep * 2);
        for (int64_t i = 0; i < p.m; ++i)
            std::memcpy(rows.at + i * deep * 2, p.term.s + i * p.term.ss, p.term.rank * 2);
    }
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory tiles(chunk * size * wide), corners(8 * TILE), filled(SIDE * chunk * size);
        const Memory kept(4 * (chunk < p.k ? tall : SIDE) * wide), terms(8 * TILE);
        const Memory thin_tiles(deep * wide * 2 + 64);
        Ending<E, Y> ending{p};
        int64_t turn = 0;
        whole = tiles.at && corners.at && filled.at && kept.at && terms.at && thin_tiles.at;
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < across * down; ++block) {
            if (!whole) continue;
            const int64_t left = block % across * wide, start = block / across * tall;
            const int64_t right = std::min(left + wide, p.n), stop = std::min(start + tall, p.m);
            const int64_t panels = (right - left + SIDE - 1) / SIDE;
            if (deep) lay_block(b, left, panels, 0, deep, thin_tiles.at);
            for (int64_t from = 0; from < p.k; from += chunk) {
                const int64_t to = std::min(from + chunk, p.k);
                for (int64_t at = from; at < to; at += pass)
                    lay_block(p.w, left, panels, at, std::min(at + pass, to),
                              tiles.at + (at - from) * size * panels * SIDE);
                for (int64_t top = start; top < stop; top += SIDE) {
                    const int64_t high = std::min(SIDE, stop - top);
                    const E* x = p.x + top * p.xs + from;
                    int64_t stride = p.xs;
                    if (high < SIDE) {  // the last rows, with zeros below them
                        stride = to - from;
                        std::memset(filled.at, 0, SIDE * stride * size);
                        for (int64_t i = 0; i < high; ++i)
                            std::memcpy(filled.at + i * stride * size, x + i * p.xs, stride * size);
                        x = reinterpret_cast<const E*>(filled.at);
                    }
                    char* strip = kept.at + (chunk < p.k ? top - start : 0) * wide * 4;
                    for (int64_t at = from; at < to; at += pass) {
                        const int64_t end = std::min(at + pass, to), depth = (end - at) * size;
                        const char* tile = tiles.at + (at - from) * size * panels * SIDE;
                        for (int64_t panel = 0; panel < panels; ++panel) {
                            char* sums = strip + panel * 4 * TILE;
                            char* corner = corners.at + turn % 2 * 4 * TILE;
                            multiply(x + (at - from), stride * size, tile + panel * SIDE * depth,
                                     depth, at ? sums : nullptr, end < p.k ? sums : corner, ending);
                            if (end < p.k) continue;
                            char* beside = deep ? terms.at + turn % 2 * 4 * TILE : nullptr;
                            if (deep)
                                multiply(s + top * deep, deep * 2,
                                         thin_tiles.at + panel * SIDE * deep * 2, deep * 2,
                                         nullptr, beside, ending);
                            ending.write(SIDE);  // what was left
                            ending.begin(corner, beside, top, high, left + panel * SIDE);
                            ++turn;
                        }
                    }
                }
            }
        }
        ending.write(SIDE);
    }
    return whole;
}

}  // namespace
#endif

extern "C" {

// 1: tile registers, which the system lets this process use; 2: vector registers; 0: neither.
int tiles_ready() {
#if defined(TILE_REGISTERS)
    constexpr int REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, the tiles' contents
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
#elif defined(TILES)
    return 2;
#else
    return 0;
#endif
}

#ifdef TILES
// 0: no memory.
#define MULTIPLY(NAME, E, Y)                                                                     \
    int NAME(const E* x, const E* w, const float* rows, const float* columns, const float* bias,  \
              Y* y, int64_t m, int64_t n, int64_t k, int64_t xs, int64_t ws, int64_t ys,          \
              int64_t across, int64_t add, const bfloat* s, const bfloat* b, int64_t rank,        \
              int64_t ss, int64_t bs, int64_t b_across, const uint16_t* bits,                     \
              const int64_t* places, int64_t part_rows, float scale, int threads) {               \
        const Term term{s, {b, n, bs, b_across != 0}, rank, ss, scale, {bits, places, part_rows, n}}; \
        return multiply_all(Product<E, Y>{x, {w, n, ws, across != 0}, rows, columns, bias, y, m,  \
                                          n, k, xs, ys, add != 0, term},                          \
                            threads);                                                             \
    }
MULTIPLY(multiply_bf16, bfloat, bfloat)
#ifdef TILE_REGISTERS
MULTIPLY(multiply_codes_bf16, int8_t, bfloat)
MULTIPLY(multiply_codes_fp32, int8_t, float)
#endif
#endif
}
