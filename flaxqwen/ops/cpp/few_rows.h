// Products of a few rows with weights: which there are for what dtypes, and how threads share them out.

#pragma once

#include "many_rows.h"

// What is not worth another thread's waking, in bytes of the weight.
constexpr int64_t kSmallestPart = 1 << 16;
// The same, in elements of x, of writing it as tiles.
[[maybe_unused]] constexpr int64_t kSmallestFill = 1 << 13;

// Calls run with the products of x and a weight of these dtypes, the weight's type and that of the results; false:
// there are none.
template <typename Run>
bool with_types(ffi::DataType x, ffi::DataType weight, ffi::DataType y, Run run) {
  auto are = [=](ffi::DataType x_type, ffi::DataType weight_type, ffi::DataType y_type) {
    return x == x_type && weight == weight_type && y == y_type;
  };
  if (are(ffi::F32, ffi::F32, ffi::F32)) return run.template operator()<Wide, float, float>(), true;
  if (are(ffi::F32, ffi::S8, ffi::F32)) return run.template operator()<Wide, int8_t, float>(), true;
#ifdef __AVX512BF16__
  if (are(ffi::BF16, ffi::S8, ffi::F32)) return run.template operator()<Pairs, int8_t, float>(), true;
  if (are(ffi::BF16, ffi::BF16, ffi::F32)) return run.template operator()<Pairs, bfloat16, float>(), true;
  if (are(ffi::BF16, ffi::BF16, ffi::BF16)) return run.template operator()<Pairs, bfloat16, bfloat16>(), true;
#else
  if (are(ffi::F32, ffi::BF16, ffi::F32)) return run.template operator()<Wide, bfloat16, float>(), true;
  if (are(ffi::F32, ffi::BF16, ffi::BF16)) return run.template operator()<Wide, bfloat16, bfloat16>(), true;
#endif
  return false;
}

// How many parts to make of a work of this size; 1 at least, whatever the pool says.
inline int64_t parts_of(ffi::ThreadPool& pool, int64_t size, int64_t smallest) {
  return std::clamp<int64_t>(pool.num_threads(), 1, std::max<int64_t>(size / smallest, 1));
}

// Outputs in parts for the pool's threads, which begin at a multiple of 16, as tiles do.
struct Cut {
  int64_t out, parts;

  Cut(ffi::ThreadPool& pool, int64_t out, int64_t bytes) : out(out), parts(parts_of(pool, bytes, kSmallestPart)) {}

  int64_t edge(int64_t part) const { return part == parts ? out : out * part / parts & -16; }
  // The most outputs of a part.
  int64_t widest() const { return std::min(out, (out + parts - 1) / parts + 15); }
};

// Of x [rows, in] with weights [out, in]: calls run(product, row, rows, begin, end) for all rows and for the outputs
// from 0 to cut.out. product(weight, y, begin, end) then gives y, of which shape.out numbers are a row, of those rows.
template <typename Products, typename Weight, typename Result, typename Run>
void multiply_in_parts(ffi::ThreadPool& pool, const typename Products::Element* x, Shape shape, Cut cut, Run run) {
#ifdef __AMX_TILE__
  if constexpr (!std::is_same_v<Weight, float>) {
    using Rows = Tiles<Weight, typename Products::Element>;
    if (Rows::take(shape.in)) {
      const int64_t most = Rows::most_rows(shape.in);
      for (int64_t row = 0; row < shape.rows; row += most) {
        const int64_t rows = std::min(most, shape.rows - row);
        const Rows tiles(x + row * shape.in, Shape{rows, shape.in, shape.out});
        const int64_t fills = parts_of(pool, rows * shape.in, kSmallestFill);
        in_parts(pool, fills, [&tiles, fills](int64_t part) {
          tiles.fill(tiles.steps() * part / fills, tiles.steps() * (part + 1) / fills);
        });
        auto product = [&tiles](const Weight* weight, Result* y, int64_t begin, int64_t end) {
          tiles.multiply(weight, y, begin, end);
        };
        in_parts(pool, cut.parts,
                 [=](int64_t part) { run(product, row, rows, cut.edge(part), cut.edge(part + 1)); });
      }
      return;
    }
  }
#endif
  auto product = [=](const Weight* weight, Result* y, int64_t begin, int64_t end) {
    multiply<Products, Weight, Result>(weight, x, y, shape, begin, end);
  };
  in_parts(pool, cut.parts,
           [=](int64_t part) { run(product, 0, shape.rows, cut.edge(part), cut.edge(part + 1)); });
}
