// Products of small matrices that lie in a core's cache: sums [rows, kColumns] of a [rows, words] times b [words,
// kColumns], or as much more; and rows that become columns of b, or come from columns of sums.
//
// A word has 4 bytes, a number of float32 or two of bfloat16 that lie beside each other in a row of a, and in the same
// place of b. Both factors are of one dtype, sums are of float32.

#pragma once

#include "tiles.h"

// Columns of b, and what the rows of a are a multiple of.
constexpr int kColumns = 32, kRows = 32;

// Rows that go in as columns of b, and come out of the columns of sums, so many at a time.
constexpr int kHalf = kColumns / 2;

#ifdef __AVX512BF16__

// Of 16 rows of 16 words each, the columns.
INLINE void transpose(__m512i rows[16]) {
  __m512i mixed[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    mixed[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    mixed[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(mixed[i], mixed[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(mixed[i], mixed[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(mixed[i + 1], mixed[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(mixed[i + 1], mixed[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    mixed[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    mixed[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    mixed[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    mixed[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(mixed[i], mixed[i + 8], 0xdd);
  }
}

// Up to 16 words, and zeros.
INLINE __m512i load_words(const float* p, int64_t count) {
  return _mm512_maskz_loadu_epi32(count >= 16 ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1, p);
}
INLINE __m512i load_words(const bfloat16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << std::max<int64_t>(count, 0)) - 1, p);
}

// b of up to kColumns rows [count, width], `stride` apart; zeros beyond, and up to a width that kRows divides.
template <typename Element>
void put_columns(const Element* rows, int64_t stride, int64_t count, int64_t width, Element* to) {
  constexpr int kWidth = 64 / sizeof(Element);  // of 16 words
  for (int64_t i = 0; i < (width + kRows - 1) / kRows * kRows; i += kWidth, to += kWidth * kColumns)
    for (int half = 0; half < kColumns; half += kHalf) {
      __m512i words[16];
      for (int row = half; row < half + kHalf; row++)
        words[row - half] = load_words(rows + row * stride + i, row < count ? width - i : 0);
      transpose(words);
      for (int word = 0; word < 16; word++)
        _mm512_store_si512(to + (word * kColumns + half) * kWidth / 16, words[word]);
    }
}

// kHalf of the columns of sums [kRows, kColumns] as rows of y [count, width], `stride` apart, as many as there are.
INLINE void put_rows(const float* sums, bfloat16* y, int64_t stride, int64_t count, int64_t width) {
  __m512i rows[16];  // two sums to a word
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++, sums += 2 * kColumns)
    rows[i] = pair_of(_mm512_load_ps(sums), _mm512_load_ps(sums + kColumns));
  transpose(rows);
  const __mmask32 mask = width >= 32 ? ~0u : (1u << width) - 1;
  for (int64_t i = 0; i < std::min<int64_t>(count, kHalf); i++) _mm512_mask_storeu_epi16(y + i * stride, mask, rows[i]);
}
INLINE void put_rows(const float* sums, float* y, int64_t stride, int64_t count, int64_t width) {
  for (int part = 0; part < 2 && width > 0; part++, width -= 16, y += 16, sums += 16 * kColumns) {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) rows[i] = _mm512_load_si512(sums + i * kColumns);
    transpose(rows);
    const __mmask16 mask = width >= 16 ? 0xffff : (1u << width) - 1;
    for (int64_t i = 0; i < std::min<int64_t>(count, kHalf); i++)
      _mm512_mask_storeu_epi32(y + i * stride, mask, rows[i]);
  }
}

#else

template <typename Row>
void put_columns(const Row* rows, int64_t stride, int64_t count, int64_t width, float* to) {
  std::memset(to, 0, (width + kRows - 1) / kRows * kRows * kColumns * sizeof *to);
  for (int64_t row = 0; row < std::min<int64_t>(count, kColumns); row++)
    for (int64_t i = 0; i < width; i++) to[i * kColumns + row] = to_float(rows[row * stride + i]);
}

template <typename Result>
void put_rows(const float* sums, Result* y, int64_t stride, int64_t count, int64_t width) {
  for (int64_t row = 0; row < std::min<int64_t>(count, kHalf); row++)
    for (int64_t i = 0; i < std::min<int64_t>(width, kRows); i++)
      round_to(y + row * stride + i, sums[i * kColumns + row]);
}

#endif

// float32 as a sum of so many numbers of bfloat16, which have 8 bits each. Of their products those count whose numbers
// add up to less: the others are under 2^-24 of the product.
constexpr int kMostParts = 3;

#ifdef __AVX512BF16__

template <typename Number>
constexpr int kPartsOf = std::is_same_v<Number, float> ? kMostParts : 1;

// 32 numbers in parts, each of them what those before it leave, rounded. Infinity has parts that are NaN.
INLINE void split(const bfloat16* p, __m512i parts[1]) { parts[0] = _mm512_loadu_si512(p); }
INLINE void split(const int8_t* p, __m512i parts[1]) { parts[0] = (__m512i)Pairs::load(p); }
INLINE void split(const float* p, __m512i parts[kMostParts]) {
  __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
  auto rest = [](__m512 x, __m256i rounded) {
    return x - _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
  };
#pragma GCC unroll 3
  for (int i = 0; i < kMostParts; i++) {
    parts[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    low = rest(low, _mm512_castsi512_si256(parts[i]));
    high = rest(high, _mm512_extracti64x4_epi64(parts[i], 1));
  }
}

#endif

// By the products of vectors, Wide or Pairs.
template <typename Products>
struct VectorBlocks {
  using Element = typename Products::Element;
  static constexpr int kWord = 4 / sizeof(Element), kLanes = Wide::kLanes;

  static void begin() {}
  static void end() {}

  // `stride` elements from a row of a to the next.
  template <bool is_more>
  static void multiply(float* sums, const Element* a, int64_t stride, const Element* b, int64_t rows, int64_t words) {
    for (int64_t row = 0; row < rows; row += kMostRows)
      for (int column = 0; column < kColumns; column += 2 * kLanes)
        multiply_rows<is_more>(sums + row * kColumns + column, a + row * stride, stride, b + column * kWord, words);
  }

 private:
  template <bool is_more>
  static INLINE void multiply_rows(float* to, const Element* a, int64_t stride, const Element* b, int64_t words) {
    typename Products::Sums sums[kMostRows][2];
#pragma GCC unroll 8
    for (int row = 0; row < kMostRows; row++)
      for (int i = 0; i < 2; i++)
        sums[row][i] = is_more ? Wide::load(to + row * kColumns + i * kLanes) : Products::zeros();
    for (int64_t word = 0; word < words; word++, a += kWord, b += kColumns * kWord) {
      auto first = Products::load(b), second = Products::load(b + kLanes * kWord);
#pragma GCC unroll 8
      for (int row = 0; row < kMostRows; row++) {
        auto vector = Products::all_of(a + row * stride);
        sums[row][0] = Products::add_products(sums[row][0], vector, first);
        sums[row][1] = Products::add_products(sums[row][1], vector, second);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kMostRows; row++)
      for (int i = 0; i < 2; i++) Wide::store(to + row * kColumns + i * kLanes, sums[row][i]);
  }
};

#ifdef __AMX_TILE__

// The same of bfloat16 by tiles; words are a multiple of 16.
struct TileBlocks {
  using Element = bfloat16;
  static constexpr int kWord = 2;

  static void begin() { TileSizes(kTile, kTile).load(); }
  static void end() { _tile_release(); }

  // Of a and b in parts, which stand for their sums and lie so far from each other: of pairs of parts that matter.
  template <bool is_more, int a_parts = 1, int b_parts = 1>
  static void multiply(float* sums, const Element* a, int64_t stride, const Element* b, int64_t rows, int64_t words,
                       int64_t a_part = 0, int64_t b_part = 0) {
    constexpr int kLine = 4 * kColumns;
    see_memory();
    for (int64_t row = 0; row < rows; row += 2 * kTile, sums += 2 * kTile * kColumns, a += 2 * kTile * stride) {
      float* lower = sums + kTile * kColumns;
      if constexpr (is_more) {
        _tile_loadd(0, sums, kLine);
        _tile_loadd(1, lower, kLine);
        _tile_loadd(2, sums + kTile, kLine);
        _tile_loadd(3, lower + kTile, kLine);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t word = 0; word < words; word += kTile) {
#pragma GCC unroll 3
        for (int i = 0; i < a_parts; i++) {
          auto from = a + i * a_part + word * kWord;
          _tile_loadd(4, from, stride * sizeof(Element));
          _tile_loadd(5, from + kTile * stride, stride * sizeof(Element));
#pragma GCC unroll 3
          for (int j = 0; j < std::min(b_parts, kMostParts - i); j++) {
            auto x = b + j * b_part + word * kColumns * kWord;
            _tile_loadd(6, x, kLine);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, x + kTile * kWord, kLine);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, sums, kLine);
      _tile_stored(1, lower, kLine);
      _tile_stored(2, sums + kTile, kLine);
      _tile_stored(3, lower + kTile, kLine);
    }
  }
};

#endif
