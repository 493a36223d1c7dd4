// The thin products of a low-rank term in tiles, each in one pass over its wide operand, dropout
// included: a mask is read from a table of bits while the operand is, and is never multiplied with.
// Sums do not depend on the number of threads. Knows no torch.

#include "tiles.hpp"

#ifdef TILES
namespace {

constexpr int64_t SIZE = 2;            // bytes of an entry
constexpr int64_t PASS = 640;          // entries of a masked row at a time: 32 rows fit the first cache
constexpr int64_t COLUMNS = 256;       // of a wide operand that is read by columns
constexpr int64_t CHUNK = 256;         // of its rows at a time

// `count` rows from `row` on, columns [from, end) of x, with zeros where masked and below.
void copy_kept(const bfloat* x, int64_t stride, int64_t row, int64_t count, int64_t all,
               int64_t from, int64_t end, const Mask& mask, bfloat* to) {
    const int64_t wide = end - from;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t at = 0; at < wide; at += 32)
            _mm512_storeu_si512(to + i * wide + at,
                                _mm512_maskz_loadu_epi16(mask.kept(row + i, from + at),
                                                         x + (row + i) * stride + from + at));
    std::memset(to + count * wide, 0, (all - count) * wide * SIZE);
}

// s (rows, rank) = scale · mask(x) (rows, width) · a; whether there was memory.
bool shrink_all(const bfloat* x, const Stored<bfloat>& a, bfloat* s, int64_t rows, int64_t width,
                int64_t rank, int64_t xs, int64_t ss, float scale, const Mask& mask,
                int threads) {
    const int64_t panels = up(rank, SIDE) / SIDE, pass = part(width, PASS, 32);
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory tiles(panels * SIDE * width * SIZE), strip(SIDE * pass * SIZE);
        const Memory sums(panels * 4 * TILE);
        Nothing nothing;
        whole = tiles.at && strip.at && sums.at;
        for (int64_t at = 0; whole && at < width; at += pass)
            lay_block(a, 0, panels, at, std::min(at + pass, width),
                      tiles.at + at * SIZE * panels * SIDE);
#pragma omp for
        for (int64_t top = 0; top < rows; top += SIDE) {
            if (!whole) continue;
            const int64_t high = std::min(SIDE, rows - top);
            bfloat* held = reinterpret_cast<bfloat*>(strip.at);
            for (int64_t at = 0; at < width; at += pass) {
                const int64_t end = std::min(at + pass, width), wide = end - at;
                const bfloat* from = x + top * xs + at;
                int64_t stride = xs;
                if (mask.bits || high < SIDE) {
                    copy_kept(x, xs, top, high, SIDE, at, end, mask, held);
                    from = held, stride = wide;
                }
                for (int64_t panel = 0; panel < panels; ++panel) {
                    char* to = sums.at + panel * 4 * TILE;
                    multiply(from, stride * SIZE,
                             tiles.at + (at * panels + panel * wide) * SIDE * SIZE, wide * SIZE,
                             at ? to : nullptr, to, nothing);
                }
            }
            for (int64_t i = 0; i < high; ++i)
                for (int64_t at = 0; at < rank; at += 16) {
                    const __m512 sum = _mm512_mul_ps(_mm512_load_ps(piece(sums.at, i, at)),
                                                     _mm512_set1_ps(scale));
                    _mm256_mask_storeu_epi16(s + (top + i) * ss + at, first(rank - at),
                                             (__m256i)_mm512_cvtneps_pbh(sum));
                }
        }
    }
    return whole;
}

// Rows of y that a product with the low rank is added to, a few while the tiles work on the next.
struct Adding {
    bfloat* y;
    int64_t ys;
    float scale;
    const Mask& mask;
    char* sums = nullptr;
    int64_t top = 0, left = 0, done = 0, high = 0;

    void write(int64_t count) {
        const __m512 factor = _mm512_set1_ps(scale);
        for (const int64_t stop = std::min(high, done + count); done < stop; ++done) {
            bfloat* at = y + (top + done) * ys + left;
            const __m512i old = _mm512_loadu_si512(at);
            const __mmask32 kept = mask.kept(top + done, left);
            const __m512i l = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(old));
            const __m512i h = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1));
            const __m512 low = _mm512_maskz_load_ps(uint16_t(kept), piece(sums, done, 0));
            const __m512 high_ = _mm512_maskz_load_ps(uint16_t(kept >> 16), piece(sums, done, 16));
            const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(l, 16));
            const __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(h, 16));
            _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high_, factor, b),
                                                                 _mm512_fmadd_ps(low, factor, a)));
        }
    }
};

// y (rows, width) += scale · mask(s (rows, rank) · b); whether there was memory.
bool expand_all(bfloat* y, const bfloat* s, const Stored<bfloat>& b, int64_t rows, int64_t width,
                int64_t rank, int64_t ys, int64_t ss, float scale, const Mask& mask, int threads) {
    const int64_t deep = up(rank, SIDE), panels = width / SIDE;
    const Memory room(deep * width * SIZE);
    if (!room.at) return false;
    const Stored<bfloat> whole_b = padded(b, width, rank, room.at);
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory tiles(width * deep * SIZE), strip(SIDE * deep * SIZE), sums(8 * TILE);
        whole = tiles.at && strip.at && sums.at;
        if (whole) lay_block(whole_b, 0, panels, 0, deep, tiles.at);
        Adding adding{y, ys, scale, mask};
        int64_t turn = 0;
#pragma omp for
        for (int64_t top = 0; top < rows; top += SIDE) {
            if (!whole) continue;
            const int64_t high = std::min(SIDE, rows - top);
            bfloat* x = reinterpret_cast<bfloat*>(strip.at);
            adding.write(SIDE);
            std::memset(strip.at, 0, SIDE * deep * SIZE);
            for (int64_t i = 0; i < high; ++i)
                std::memcpy(x + i * deep, s + (top + i) * ss, rank * SIZE);
            for (int64_t panel = 0; panel < panels; ++panel) {
                char* to = sums.at + turn++ % 2 * 4 * TILE;
                multiply(x, deep * SIZE, tiles.at + panel * SIDE * deep * SIZE, deep * SIZE, nullptr,
                         to, adding);
                adding.write(SIDE);
                adding.sums = to, adding.top = top, adding.left = panel * SIDE;
                adding.done = 0, adding.high = high;
            }
        }
        adding.write(SIDE);
    }
    return whole;
}

// out (rank, width) = scale · sᵀ (rank, rows) · mask(x) (rows, width); whether there was memory.
bool gather_all(const bfloat* x, const bfloat* s, float* out, int64_t rows, int64_t width,
                int64_t rank, int64_t xs, int64_t ss, float scale, const Mask& mask, int threads) {
    const int64_t tall = up(rank, SIDE), deep = up(rows, SIDE);
    const int64_t columns = part(width, COLUMNS, SIDE);
    const Memory turned(tall * deep * SIZE);
    if (!turned.at) return false;
    bfloat* st = reinterpret_cast<bfloat*>(turned.at);
    std::memset(turned.at, 0, tall * deep * SIZE);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < rank; ++j) st[j * deep + i] = s[i * ss + j];
    bool whole = true;
#pragma omp parallel num_threads(threads) reduction(&& : whole) if (threads > 1)
    {
        const Registers registers;
        const Memory held(CHUNK * columns * SIZE), tiles(CHUNK * columns * SIZE);
        const Memory sums(tall * columns * 4);
        Nothing nothing;
        whole = held.at && tiles.at && sums.at;
#pragma omp for schedule(dynamic)
        for (int64_t left = 0; left < width; left += columns) {
            if (!whole) continue;
            const int64_t right = std::min(left + columns, width), panels = (right - left) / SIDE;
            for (int64_t top = 0; top < rows; top += CHUNK) {
                const int64_t high = std::min(CHUNK, rows - top), all = up(high, SIDE);
                const bfloat* from = x + top * xs + left;
                int64_t stride = xs;
                if (mask.bits || high < all) {
                    bfloat* to = reinterpret_cast<bfloat*>(held.at);
                    copy_kept(x, xs, top, high, all, left, right, mask, to);
                    from = to, stride = right - left;
                }
                lay_block(Stored<bfloat>{from, right - left, stride, true}, 0, panels, 0, all,
                          tiles.at);
                for (int64_t row = 0; row < tall; row += SIDE)
                    for (int64_t panel = 0; panel < panels; ++panel) {
                        char* to = sums.at + (row / SIDE * panels + panel) * 4 * TILE;
                        multiply(st + row * deep + top, deep * SIZE,
                                 tiles.at + panel * SIDE * all * SIZE, all * SIZE,
                                 top ? to : nullptr, to, nothing);
                    }
            }
            for (int64_t i = 0; i < rank; ++i)
                for (int64_t at = left; at < right; at += 16) {
                    char* block = sums.at + i / SIDE * panels * 4 * TILE;
                    const __m512 sum = _mm512_load_ps(piece(block, i % SIDE, at - left));
                    _mm512_storeu_ps(out + i * width + at,
                                     _mm512_mul_ps(sum, _mm512_set1_ps(scale)));
                }
        }
    }
    return whole;
}

}  // namespace

// 0: no memory. Strides in entries, widths in 32s; bits may be null.
#define WIDE                                                                                  \
    int64_t rows, int64_t width, int64_t rank, const uint16_t *bits, const int64_t *places,   \
        int64_t part_rows, float scale

extern "C" {

int shrink_bf16(const bfloat* x, const bfloat* a, bfloat* s, int64_t xs, int64_t as, int64_t ss,
                int64_t across, WIDE, int threads) {
    return shrink_all(x, {a, rank, as, across != 0}, s, rows, width, rank, xs, ss, scale,
                      {bits, places, part_rows, width}, threads);
}

int expand_bf16(bfloat* y, const bfloat* s, const bfloat* b, int64_t ys, int64_t ss, int64_t bs,
                int64_t across, WIDE, int threads) {
    return expand_all(y, s, {b, width, bs, across != 0}, rows, width, rank, ys, ss, scale,
                      {bits, places, part_rows, width}, threads);
}

int gather_bf16(const bfloat* x, const bfloat* s, float* out, int64_t xs, int64_t ss, WIDE,
                int threads) {
    return gather_all(x, s, out, rows, width, rank, xs, ss, scale,
                      {bits, places, part_rows, width}, threads);
}
}
#endif
