// Products of small matrices that lie in a core's cache: sums [rows, kColumns] = a [rows, words] b [words, kColumns], or
// as much more.
//
// A word has 4 bytes, a number of float32 or two of bfloat16 that lie beside each other in a row of a, and in the same
// place of b. Both factors are of one dtype, sums are of float32.

#pragma once

#include "tiles.h"

// Columns of b, and what the rows of a are a multiple of.
constexpr int kColumns = 32, kRows = 32;

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

  template <bool is_more>
  static void multiply(float* sums, const Element* a, int64_t stride, const Element* b, int64_t rows, int64_t words) {
    constexpr int kLine = 4 * kColumns;
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
        auto from = a + word * kWord, x = b + word * kColumns * kWord;
        _tile_loadd(4, from, stride * sizeof(Element));
        _tile_loadd(6, x, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, from + kTile * stride, stride * sizeof(Element));
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, x + kTile * kWord, kLine);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, kLine);
      _tile_stored(1, lower, kLine);
      _tile_stored(2, sums + kTile, kLine);
      _tile_stored(3, lower + kTile, kLine);
    }
  }
};

#endif
