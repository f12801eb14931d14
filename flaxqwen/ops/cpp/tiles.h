// Products of few rows by AMX, which multiplies tiles: 16 outputs of the weight, as it lies in memory, by 16 columns.
// At so few rows memory is the limit, and not the multiplications.
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

// Rows of a tile, the bytes of each, and as how many words of 4 bytes they are multiplied.
constexpr int kTile = 16, kTileBytes = 64;
// How many columns of tiles have sums in registers at once.
constexpr int kMostBlocks = 4;
constexpr int kDigits = 4;
// Of so many lines of memory one is asked for ahead; the rest the CPU itself then fetches. All of them take 10% longer,
// none 2% (a single row of bfloat16, Granite Rapids).
constexpr int kLinesAhead = 8;

// What _tile_loadconfig reads. Tiles 0 to 3 are sums, 4 and 5 of the weight, 6 of x.
struct TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileSizes(int64_t outputs, int64_t columns) {
    for (int sums : {0, 1, 2, 3}) set(sums, outputs, 4 * columns);
    for (int weight : {4, 5}) set(weight, outputs, kTileBytes);
    set(6, kTile, 4 * columns);
  }

  void set(int tile, int64_t count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
INLINE uint32_t bits_of(bfloat16 x) { return uint32_t{x.bits} << 16; }

// 4 numbers as float32.
INLINE __m128 load_four(const float* p) { return _mm_loadu_ps(p); }
INLINE __m128 load_four(const bfloat16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(as<__m128i>(p))), 16));
}

// x [rows, in] as tiles of columns, and its products with a weight [out, in].
template <typename Weight, typename Element>
class Tiles {
 public:
  static constexpr bool kIsInteger = std::is_same_v<Weight, int8_t>;
  static constexpr int64_t kColumnsOfRow = kIsInteger ? kDigits : 1;
  static constexpr int64_t kMostRows = kMostBlocks * kTile / kColumnsOfRow;
  using Sum = std::conditional_t<kIsInteger, int32_t, float>;

  static bool take(Shape shape) {
    return shape.rows >= 1 && shape.rows <= kMostRows && shape.in > 0 && shape.in * sizeof(Weight) % kTileBytes == 0;
  }

  Tiles(const Element* x, Shape shape)
      : x_(x),
        shape_(shape),
        steps_(shape.in * sizeof(Weight) / kTileBytes),
        blocks_((shape.rows * kColumnsOfRow + kTile - 1) / kTile),
        rows_((shape.rows + blocks_ - 1) / blocks_),
        columns_(rows_ * kColumnsOfRow),
        words_(std::make_unique_for_overwrite<uint32_t[]>(steps_ * blocks_ * kTile * columns_)),
        units_(std::make_unique<double[]>(kMostRows)) {
    if constexpr (kIsInteger)
      for (int64_t row = 0; row < shape.rows; row++) units_[row] = unit_of(x + row * shape.in);
  }

  int64_t steps() const { return steps_; }

  // Writes the tiles of the steps from `begin` to `end`.
  void fill(int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < shape_.rows; row++) {
      double per_unit = kIsInteger && std::isfinite(units_[row]) ? 1 / units_[row] : 0;
      for (int64_t step = begin; step < end; step++) {
        uint32_t* to = words_.get() + (step * blocks_ + row / rows_) * kTile * columns_ + row % rows_;
        const Element* from = x_ + row * shape_.in + step * (kTileBytes / sizeof(Weight));
        for (int i = 0; i < kTile; i++, to += columns_)
          if constexpr (kIsInteger) {
            alignas(16) uint32_t digits[kDigits];
            _mm_store_si128(reinterpret_cast<__m128i*>(digits), digits_of(from + 4 * i, per_unit));
            for (int digit = 0; digit < kDigits; digit++) to[digit * rows_] = digits[digit];
          } else {
            *to = as<uint32_t>(from)[i];
          }
      }
    }
  }

  // y [rows, out] of the outputs from `begin` to `end`.
  void multiply(const Weight* weight, float* y, int64_t begin, int64_t end) const {
    for (int64_t left; (left = end - begin) > 0;) {
      TileSizes sizes(std::min<int64_t>(left, kTile), columns_);
      _tile_loadconfig(&sizes);
      do {
        auto rows = as<char>(weight + begin * shape_.in);
        int64_t outputs = std::min<int64_t>(left, blocks_ <= 2 && left >= 2 * kTile ? 2 * kTile : kTile);
        if (blocks_ == 1) outputs > kTile ? multiply_tiles<1, 2>(rows, y + begin, outputs) : multiply_tiles<1, 1>(rows, y + begin, outputs);
        if (blocks_ == 2) outputs > kTile ? multiply_tiles<2, 2>(rows, y + begin, outputs) : multiply_tiles<2, 1>(rows, y + begin, outputs);
        if (blocks_ == 3) multiply_tiles<3, 1>(rows, y + begin, outputs);
        if (blocks_ == 4) multiply_tiles<4, 1>(rows, y + begin, outputs);
        begin += outputs, left -= outputs;
      } while (left >= kTile);
    }
    _tile_release();
  }

 private:
  // Such that the largest element of a row is under 2^30 of it; NaN where one is not finite.
  double unit_of(const Element* x) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < shape_.in; i++) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
    int exponent = static_cast<int>(largest >> 23);
    return exponent == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, std::max(exponent, 1) - 156);
  }

  // 4 elements as words: first all last digits, then those before, each of them from -128 to 127.
  static INLINE __m128i digits_of(const Element* x, double per_unit) {
    __m128i units = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(load_four(x)), _mm256_set1_pd(per_unit)));
    const __m128i halves = _mm_set1_epi32(static_cast<int>(0x80808080u));  // 128 in each digit, with what it carries
    __m128i digits = _mm_xor_si128(_mm_add_epi32(units, halves), halves);
    return _mm_shuffle_epi8(digits, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }

  // Up to 16 outputs, or 32 where it is `high` 2, of which `weight` is the first row.
  template <int blocks, int high>
  void multiply_tiles(const char* weight, float* y, int64_t outputs) const {
    const int64_t row_bytes = shape_.in * sizeof(Weight), stride = 4 * columns_;
    auto x = as<char>(words_.get());
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps_; step++, weight += kTileBytes) {
      // The rows that come next, in the order in which they lie.
      const char* ahead = weight + high * kTile * row_bytes + step * (high * kTile - 1) * kTileBytes;
#pragma GCC unroll 4
      for (int line = 0; line < high * kTile; line += kLinesAhead) __builtin_prefetch(ahead + line * kTileBytes, 0, 2);
      _tile_loadd(4, weight, row_bytes);
      if constexpr (high == 2) _tile_loadd(5, weight + kTile * row_bytes, row_bytes);
#define MULTIPLY(block, first, second)                       \
  if constexpr (block < blocks) {                            \
    _tile_loadd(6, x, stride);                               \
    if constexpr (kIsInteger) _tile_dpbssd(first, 4, 6);     \
    else _tile_dpbf16ps(first, 4, 6);                        \
    if constexpr (high == 2) {                               \
      if constexpr (kIsInteger) _tile_dpbssd(second, 5, 6);  \
      else _tile_dpbf16ps(second, 5, 6);                     \
    }                                                        \
    x += kTile * stride;                                     \
  }
      MULTIPLY(0, 0, 2) MULTIPLY(1, 1, 3) MULTIPLY(2, 2, 2) MULTIPLY(3, 3, 3)
#undef MULTIPLY
    }
    alignas(kCacheLine) Sum sums[kMostBlocks][kTile * kTile];
    _tile_stored(0, sums[0], stride);
    if constexpr (blocks > 1) _tile_stored(1, sums[1], stride);
    if constexpr (blocks > 2 || high > 1) _tile_stored(2, sums[2], stride);
    if constexpr (blocks > 3 || high * blocks > 3) _tile_stored(3, sums[3], stride);
    for (int block = 0; block < blocks; block++)
      for (int tile = 0; tile < high; tile++)
        put(sums[block + 2 * tile], block, y + tile * kTile, std::min<int64_t>(kTile, outputs - tile * kTile));
  }

  // The results of a tile's sums [outputs, columns], which are those of a block of rows.
  void put(const Sum* sums, int64_t block, float* y, int64_t outputs) const {
    int64_t first = block * rows_, count = std::min(rows_, shape_.rows - first);
    y += first * shape_.out;
    if constexpr (kIsInteger) {
      alignas(kCacheLine) float results[kTile / kDigits][kTile];
      __m256d units = _mm256_loadu_pd(&units_[first]);
      for (int o = 0; o < kTile; o += 4) {
        __m128 of[4];
        for (int i = 0; i < 4; i++) of[i] = total_of_digits(sums + (o + i) * columns_, units);
        _MM_TRANSPOSE4_PS(of[0], of[1], of[2], of[3]);
        for (int row = 0; row < 4; row++) _mm_store_ps(&results[row][o], of[row]);
      }
      for (int64_t row = 0; row < count; row++) std::memcpy(y + row * shape_.out, results[row], outputs * sizeof(float));
    } else {
      for (int64_t row = 0; row < count; row++)
        for (int64_t o = 0; o < outputs; o++) y[row * shape_.out + o] = sums[o * columns_ + row];
    }
  }

  // One output of 4 rows, or of fewer and what is no result. The sums and their total are exact in float64.
  INLINE __m128 total_of_digits(const int32_t* sums, __m256d units) const {
    __m256d total = _mm256_setzero_pd();
    for (int digit = kDigits; digit-- > 0;) {
      __m256d sum = _mm256_cvtepi32_pd(_mm_loadu_si128(as<__m128i>(sums + digit * rows_)));
      total = _mm256_fmadd_pd(total, _mm256_set1_pd(256), sum);
    }
    return _mm256_cvtpd_ps(_mm256_mul_pd(total, units));
  }

  const Element* x_;
  Shape shape_;
  // rows_ and columns_: of a block.
  int64_t steps_, blocks_, rows_, columns_;
  std::unique_ptr<uint32_t[]> words_;  // [steps, blocks, 16, columns]
  std::unique_ptr<double[]> units_;
};

#endif
