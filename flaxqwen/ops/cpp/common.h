// What the kernels share: vectors, and products of few rows.
//
// setup.py builds all for CPUs with AVX2, for those with AVX-512 and its bfloat16, and for those with AMX beside them.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "threads.h"

#define INLINE inline __attribute__((always_inline))

// How far ahead of its use memory is asked for, in bytes.
#ifdef __AMX_TILE__
// A row of float32 takes 66 ms with 0.5 and 1 KB, 75 with 4 and 8 (0.5B's weights in huge pages, Granite Rapids).
constexpr int kAhead = 1024;
#else
// 6 to 16 KB are alike, 4 KB takes 10% longer (Zen 5).
constexpr int kAhead = 8192;
#endif
// Vectors in a turn of the inner loop.
constexpr int kVectors = 4;

// Memory in whole lines. A vector, or a row of a tile, that began elsewhere would lie in two: it takes twice as long.
struct alignas(kCacheLine) Line {
  uint32_t words[16];
};

// Memory that a program lends a kernel, as a result of bytes that nothing reads: XLA gives it what other operations do
// not use meanwhile. Pieces of some MB from malloc lay scattered, for what lives longer had taken the ends of those
// that were free: in the first 1,024 tokens of 0.5B in float32 they grew by 280 MB.
struct Lent {
  Line* lines = nullptr;
  int64_t bytes = 0;

  explicit Lent(ffi::RemainingRets results) {
    if (results.size() == 0) return;
    auto result = results.get<ffi::AnyBuffer>(0);
    if (!result.has_value()) return;
    const auto address = reinterpret_cast<uintptr_t>((*result)->untyped_data());
    const int64_t skipped = -address % kCacheLine;
    lines = reinterpret_cast<Line*>(address + skipped);
    bytes = static_cast<int64_t>((*result)->size_bytes()) - skipped;
  }
};

struct bfloat16 {
  uint16_t bits;
};

struct Pair {
  bfloat16 first, second;
};

template <typename To, typename From>
INLINE To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

// The nearest, halves to even; NaN stays NaN.
INLINE void round_to(float* to, float x) { *to = x; }
INLINE void round_to(bfloat16* to, float x) {
  auto bits = bits_as<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename To, typename From>
INLINE const To* as(const From* p) {
  return reinterpret_cast<const To*>(p);
}

// How products are computed: what a vector and a vector of sums are; how many rows and how many outputs a block has,
// as many as there are registers for, and how many outputs of a single row.
#ifdef __AVX512BF16__

constexpr int kMostRows = 8;

// In float32.
struct Wide {
  using Element = float;
  using Vector = __m512;
  using Sums = __m512;
  static constexpr int kLanes = 16, kOutputs = 2, kOutputsOfOneRow = 1;

  static INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE Vector load(const bfloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(as<__m256i>(p))), 16));
  }
  static INLINE Vector load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(as<__m128i>(p))));
  }
  static INLINE Sums zeros() { return _mm512_setzero_ps(); }
  static INLINE Vector all(float x) { return _mm512_set1_ps(x); }
  static INLINE Vector all_of(const float* p) { return all(*p); }
  static INLINE void store(float* p, Vector vector) { _mm512_storeu_ps(p, vector); }
  static INLINE Sums add_products(Sums sums, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sums); }
  static INLINE float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};

// Of bfloat16, two products to a sum: twice as many an instruction. int8 is exact in bfloat16.
struct Pairs {
  using Element = bfloat16;
  using Vector = __m512bh;
  using Sums = __m512;
  static constexpr int kLanes = 32, kOutputs = 2, kOutputsOfOneRow = 1;

  static INLINE Vector load(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE Vector load(const int8_t* p) { return _mm512_cvtne2ps_pbh(Wide::load(p + 16), Wide::load(p)); }
  static INLINE Sums zeros() { return _mm512_setzero_ps(); }
  // A pair, in all places.
  static INLINE Vector all_of(const bfloat16* p) {
    return (__m512bh)_mm512_set1_epi32(bits_as<int32_t>(Pair{p[0], p[1]}));
  }
  static INLINE Sums add_products(Sums sums, Vector a, Vector b) { return _mm512_dpbf16_ps(sums, a, b); }
  static INLINE float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};

// Two vectors of float32 as one of pairs, rounded.
INLINE __m512i pair_of(__m512 low, __m512 high) {
  const auto places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(places, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

#else

constexpr int kMostRows = 4;

struct Wide {
  using Element = float;
  using Vector = __m256;
  using Sums = __m256;
  static constexpr int kLanes = 8, kOutputs = 3, kOutputsOfOneRow = 3;

  static INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE Vector load(const bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(as<__m128i>(p))), 16));
  }
  static INLINE Vector load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(as<__m128i>(p))));
  }
  static INLINE Sums zeros() { return _mm256_setzero_ps(); }
  static INLINE Vector all(float x) { return _mm256_set1_ps(x); }
  static INLINE Vector all_of(const float* p) { return all(*p); }
  static INLINE void store(float* p, Vector vector) { _mm256_storeu_ps(p, vector); }
  static INLINE Sums add_products(Sums sums, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sums); }
  static INLINE float total(Sums sums) {
    float lanes[kLanes], total = 0;
    _mm256_storeu_ps(lanes, sums);
    for (float lane : lanes) total += lane;
    return total;
  }
};

#endif

// y [rows, out] of `rows` rows and `outputs` rows of the weight, of which y, x and weight are the first elements.
template <typename Products, int rows, int outputs, typename Weight, typename Result>
INLINE void multiply_block(const Weight* weight, const typename Products::Element* x, Result* y, int64_t in,
                           int64_t out) {
  constexpr int lanes = Products::kLanes, step = kVectors * lanes;
  typename Products::Sums sums[outputs][rows];
  for (auto& of_output : sums)
    for (auto& vector : of_output) vector = Products::zeros();
  int64_t i = 0;
  for (; i + step <= in; i += step) {
#pragma GCC unroll 8
    for (int o = 0; o < outputs; o++)
#pragma GCC unroll 8
      for (int byte = 0; byte < step * int{sizeof(Weight)}; byte += kCacheLine)
        __builtin_prefetch(as<char>(weight + o * in + i) + kAhead + byte);
#pragma GCC unroll 8
    for (int64_t j = i; j < i + step; j += lanes) {
      typename Products::Vector weights[outputs];
#pragma GCC unroll 8
      for (int o = 0; o < outputs; o++) weights[o] = Products::load(weight + o * in + j);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        auto vector = Products::load(x + r * in + j);
#pragma GCC unroll 8
        for (int o = 0; o < outputs; o++) sums[o][r] = Products::add_products(sums[o][r], weights[o], vector);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < outputs; o++)
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      float sum = Products::total(sums[o][r]);
      for (int64_t j = i; j < in; j++) sum += to_float(weight[o * in + j]) * to_float(x[r * in + j]);
      round_to(y + r * out + o, sum);
    }
}

struct Shape {
  int64_t rows, in, out;
};

// All rows, in blocks of `most` and of half as many, and so on; the weight's rows stay in the cache between them.
template <typename Products, int most, int outputs, typename Weight, typename Result>
INLINE void multiply_rows(const Weight* weight, const typename Products::Element* x, Result* y, Shape shape) {
  for (; shape.rows >= most; shape.rows -= most, x += most * shape.in, y += most * shape.out)
    multiply_block<Products, most, outputs>(weight, x, y, shape.in, shape.out);
  if constexpr (most > 1) multiply_rows<Products, most / 2, outputs>(weight, x, y, shape);
}

// The outputs from `begin` to `end`, by blocks and then one by one.
template <typename Products, typename Weight, typename Result>
void multiply(const void* weight_data, const void* x_data, void* y_data, Shape shape, int64_t begin, int64_t end) {
  auto weight = static_cast<const Weight*>(weight_data);
  auto x = static_cast<const typename Products::Element*>(x_data);
  auto y = static_cast<Result*>(y_data);
  constexpr int one = Products::kOutputsOfOneRow, several = Products::kOutputs;
  int64_t o = begin;
  if (shape.rows == 1)
    for (; o + one <= end; o += one) multiply_rows<Products, 1, one>(weight + o * shape.in, x, y + o, shape);
  else
    for (; o + several <= end; o += several)
      multiply_rows<Products, kMostRows, several>(weight + o * shape.in, x, y + o, shape);
  for (; o < end; o++) multiply_rows<Products, kMostRows, 1>(weight + o * shape.in, x, y + o, shape);
}
