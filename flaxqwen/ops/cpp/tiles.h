// Products by AMX, which multiplies tiles: 16 outputs of the weight, as it lies in memory, by 16 columns.
//
// bfloat16 is multiplied as it is, and summed in float32. int8 is multiplied by integers: a row of x is rounded to 31
// bits of its largest element, and cut into 4 digits of 8 bits, each of them a column. These sums are exact, and a
// result is rounded once. No weight is widened, which takes longer than to read it.

#pragma once

#include "common.h"

#ifdef __AMX_TILE__

#include <cmath>
#include <limits>
#include <type_traits>

// Rows of a tile, the bytes of each, and the most columns, of words of 4 bytes.
constexpr int kTile = 16, kTileBytes = 64;
constexpr int kDigits = 4;
// One line of memory of so many is asked for ahead, and the CPU itself then fetches the others. To ask for all takes
// 10% longer, for none 2% (a single row of bfloat16, Granite Rapids).
constexpr int kLinesAhead = 8;
// With up to so many columns of bfloat16 the outputs are taken 16 at a time: the CPU follows 16 rows of the weight
// better than 32, which is worth more than to load x half as often (0.5B: 35.4 ms and 36.6; of 8 rows 39.1 and 38.4).
constexpr int kFewColumns = 4;
// The most bytes of x at a time, or 2 blocks of columns: with 32 rows of the weight, up to some 10,000 wide, they stay
// in a core's cache of 2 MB.
constexpr int64_t kMostBytes = 5 << 18;

// What ldtilecfg reads. Tiles 0 to 3 are sums, 4 and 5 of the weight, 6 and 7 of x.
struct TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileSizes(int64_t outputs, int64_t columns) {
    for (int sums : {0, 1, 2, 3}) set(sums, outputs, 4 * columns);
    for (int weight : {4, 5}) set(weight, outputs, kTileBytes);
    for (int x : {6, 7}) set(x, kTile, 4 * columns);
  }

  void set(int tile, int64_t count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }

  // Not _tile_loadconfig: that of GCC 12 does not say that it reads all 64 bytes, and writing them may be left out.
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};
static_assert(sizeof(TileSizes) == 64);

// What was written before is in memory from here on: GCC 12's _tile_loadd does not say that it reads it.
INLINE void see_memory() { asm volatile("" ::: "memory"); }

// 4 numbers as float32.
INLINE __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
INLINE __m128 load_four(const bfloat16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(as<__m128i>(p))), 16));
}

INLINE void store_tile_row(float* p, const float* results) { _mm512_storeu_ps(p, _mm512_load_ps(results)); }
INLINE void store_tile_row(bfloat16* p, const float* results) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(results)));
}

// x [rows, in] as tiles, and its products with a weight [out, in]. The rows are in chunks of up to 2 blocks, each of
// which is the columns of a tile.
template <typename Weight, typename Element>
class Tiles {
 public:
  static constexpr bool kIsInteger = std::is_same_v<Weight, int8_t>;
  static constexpr int64_t kColumnsOfRow = kIsInteger ? kDigits : 1, kRowsOfBlock = kTile / kColumnsOfRow;
  using Sum = std::conditional_t<kIsInteger, int32_t, float>;

  // Widths of whole tiles, and such that sums of digits fit int32, and their total float64.
  static bool take(int64_t in) {
    return in > 0 && in * sizeof(Weight) % kTileBytes == 0 && (!kIsInteger || in <= 1 << 16);
  }

  // How many rows of x to take at a time, at most.
  static int64_t most_rows(int64_t in) {
    int64_t chunk = 2 * kRowsOfBlock;
    return std::max<int64_t>(kMostBytes / (in * sizeof(Weight) * kColumnsOfRow) / chunk, 1) * chunk;
  }

  Tiles(const Element* x, Shape shape)
      : x_(x),
        shape_(shape),
        steps_(shape.in * sizeof(Weight) / kTileBytes),
        blocks_(shape.rows > kRowsOfBlock ? 2 : 1),
        chunks_((shape.rows + blocks_ * kRowsOfBlock - 1) / (blocks_ * kRowsOfBlock)),
        rows_((shape.rows + chunks_ * blocks_ - 1) / (chunks_ * blocks_)),
        columns_(rows_ * kColumnsOfRow),
        lines_(std::make_unique_for_overwrite<Line[]>(chunks_ * chunk_words() / kTile)),
        units_(std::make_unique<double[]>(chunks_ * blocks_ * rows_ + kRowsOfBlock)) {
    if constexpr (kIsInteger)
      for (int64_t row = 0; row < shape.rows; row++) units_[row] = unit_of(x + row * shape.in);
  }

  int64_t steps() const { return steps_; }

  // Writes the tiles of the steps from `begin` to `end`, line after line.
  void fill(int64_t begin, int64_t end) const {
    const int64_t elements = kTileBytes / sizeof(Weight);
    for (int64_t block = 0; block < chunks_ * blocks_; block++) {
      const int64_t first = block * rows_, count = std::min(rows_, shape_.rows - first);
      uint32_t* words = chunk_at(block / blocks_) + block % blocks_ * kTile * columns_;
      for (int64_t step = begin; step < end; step++) {
        uint32_t* to = words + step * blocks_ * kTile * columns_;
        const Element* from = x_ + first * shape_.in + step * elements;
        for (int i = 0; i < kTile; i++, to += columns_, from += elements / kTile)
          for (int64_t row = 0; row < count; row++) put_word(from + row * shape_.in, first + row, to + row);
      }
    }
  }

  // y [rows, out] of the outputs from `begin` to `end`.
  template <typename Result>
  void multiply(const Weight* weight, Result* y, int64_t begin, int64_t end) const {
    const int64_t most = kIsInteger || columns_ > kFewColumns ? 2 * kTile : kTile;
    for (int64_t left; (left = end - begin) > 0;) {
      TileSizes(std::min<int64_t>(left, kTile), columns_).load();
      do {
        const int64_t outputs = left >= most ? most : std::min<int64_t>(left, kTile);
        auto product = blocks_ == 2 ? outputs > kTile ? &Tiles::multiply_tiles<2, 2, Result>
                                                      : &Tiles::multiply_tiles<2, 1, Result>
                                    : outputs > kTile ? &Tiles::multiply_tiles<1, 2, Result>
                                                      : &Tiles::multiply_tiles<1, 1, Result>;
        for (int64_t chunk = 0; chunk < chunks_; chunk++)
          (this->*product)(as<char>(weight + begin * shape_.in), y + begin, outputs, chunk);
        begin += outputs, left -= outputs;
      } while (left >= kTile);
    }
    _tile_release();
  }

 private:
  int64_t chunk_words() const { return steps_ * blocks_ * kTile * columns_; }
  uint32_t* chunk_at(int64_t chunk) const { return reinterpret_cast<uint32_t*>(lines_.get()) + chunk * chunk_words(); }

  // Such that the largest element of a row is under 2^30 of it; NaN where one is not finite.
  double unit_of(const Element* x) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < shape_.in; i++)
      largest = std::max(largest, bits_as<uint32_t>(to_float(x[i])) & 0x7fffffffu);
    int exponent = static_cast<int>(largest >> 23);
    return exponent == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, std::max(exponent, 1) - 156);
  }

  // What fills a word: 2 elements of bfloat16. Or the digits of 4, a word for each: first that of all last ones.
  void put_word(const Element* x, int64_t row, uint32_t* to) const {
    if constexpr (kIsInteger) {
      alignas(16) uint32_t digits[kDigits];
      _mm_store_si128(reinterpret_cast<__m128i*>(digits), digits_of(x, per_unit_of(row)));
      for (int digit = 0; digit < kDigits; digit++) to[digit * rows_] = digits[digit];
    } else {
      std::memcpy(to, x, sizeof *to);
    }
  }

  double per_unit_of(int64_t row) const { return units_[row] > 0 ? 1 / units_[row] : 0; }

  // Each digit is from -128 to 127.
  static INLINE __m128i digits_of(const Element* x, double per_unit) {
    __m128i units = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(load_four(x)), _mm256_set1_pd(per_unit)));
    const __m128i halves = _mm_set1_epi32(static_cast<int>(0x80808080u));  // 128 in each digit, with what it carries
    __m128i digits = _mm_xor_si128(_mm_add_epi32(units, halves), halves);
    return _mm_shuffle_epi8(digits, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }

  // Of a chunk, up to 16 outputs, or 32 where it is `high` 2; `weight` is the first of their rows.
  template <int blocks, int high, typename Result>
  void multiply_tiles(const char* weight, Result* y, int64_t outputs, int64_t chunk) const {
    const int64_t row_bytes = shape_.in * sizeof(Weight), stride = 4 * columns_;
    auto x = as<char>(chunk_at(chunk));
    see_memory();
    // The rows that come next, in the order in which they lie.
    const char* ahead = weight + high * kTile * row_bytes + chunk % kLinesAhead * kTileBytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps_; step++, weight += kTileBytes, ahead += high * kTile * kTileBytes) {
#pragma GCC unroll 4
      for (int line = 0; line < high * kTile; line += kLinesAhead) __builtin_prefetch(ahead + line * kTileBytes, 0, 2);
      _tile_loadd(4, weight, row_bytes);
      if constexpr (high == 2) _tile_loadd(5, weight + kTile * row_bytes, row_bytes);
#define MULTIPLY(block, first, second)                      \
  if constexpr (block < blocks) {                           \
    _tile_loadd(6, x, stride);                              \
    if constexpr (kIsInteger) _tile_dpbssd(first, 4, 6);    \
    else _tile_dpbf16ps(first, 4, 6);                       \
    if constexpr (high == 2) {                              \
      if constexpr (kIsInteger) _tile_dpbssd(second, 5, 6); \
      else _tile_dpbf16ps(second, 5, 6);                    \
    }                                                       \
    x += kTile * stride;                                    \
  }
      MULTIPLY(0, 0, 1) MULTIPLY(1, 2, 3)
#undef MULTIPLY
    }
    alignas(kCacheLine) Sum sums[4][kTile * kTile + kTile];  // and what is read beyond
    _tile_stored(0, sums[0], stride);
    if constexpr (high == 2) _tile_stored(1, sums[1], stride);
    if constexpr (blocks == 2) _tile_stored(2, sums[2], stride);
    if constexpr (blocks == 2 && high == 2) _tile_stored(3, sums[3], stride);
    for (int block = 0; block < blocks; block++)
      for (int tile = 0; tile < high; tile++)
        put(sums[2 * block + tile], chunk * blocks + block, y + tile * kTile,
            std::min<int64_t>(kTile, outputs - tile * kTile));
  }

  // The results of a tile's sums [outputs, columns], which are those of a block of rows.
  template <typename Result>
  void put(const Sum* sums, int64_t block, Result* y, int64_t outputs) const {
    const int64_t first = block * rows_, count = std::min(rows_, shape_.rows - first);
    for (int64_t row = 0; row < count; row += 4) {
      alignas(kCacheLine) float results[4][kTile];
      for (int o = 0; o < kTile; o += 4) {
        __m128 of[4];
        for (int i = 0; i < 4; i++) of[i] = results_of(sums + (o + i) * columns_ + row, &units_[first + row]);
        _MM_TRANSPOSE4_PS(of[0], of[1], of[2], of[3]);
        for (int i = 0; i < 4; i++) _mm_store_ps(&results[i][o], of[i]);
      }
      for (int64_t i = 0; i < std::min<int64_t>(count - row, 4); i++) {
        Result* to = y + (first + row + i) * shape_.out;
        if (outputs == kTile) {
          store_tile_row(to, results[i]);
        } else {
          for (int64_t o = 0; o < outputs; o++) round_to(to + o, results[i][o]);
        }
      }
    }
  }

  // One output of 4 rows, or of fewer and what is no result. Sums of digits and their total are exact in float64.
  INLINE __m128 results_of(const float* sums, const double*) const { return _mm_loadu_ps(sums); }
  INLINE __m128 results_of(const int32_t* sums, const double* units) const {
    __m256d total = _mm256_setzero_pd();
    for (int digit = kDigits; digit-- > 0;) {
      __m256d sum = _mm256_cvtepi32_pd(_mm_loadu_si128(as<__m128i>(sums + digit * rows_)));
      total = _mm256_fmadd_pd(total, _mm256_set1_pd(256), sum);
    }
    return _mm256_cvtpd_ps(_mm256_mul_pd(total, _mm256_loadu_pd(units)));
  }

  const Element* x_;
  Shape shape_;
  // blocks_: of a chunk; rows_, columns_: of a block.
  int64_t steps_, blocks_, chunks_, rows_, columns_;
  std::unique_ptr<Line[]> lines_;  // of words [chunks, steps, blocks, 16, columns]
  std::unique_ptr<double[]> units_;
};

#endif
