// Products of rows with a weight as an XLA custom call for CPUs: x [rows, in] weight [out, in]^T = y [rows, out].
//
// At a few rows such a product is one pass over the weight, and memory is its limit. XLA's own products wait for memory
// and then compute, because its code has no prefetch instructions: on 2 cores of a Zen 5, 24 weights of 4,864 x 896 in
// bfloat16 take it 9.7 ms for 8 rows and 4.3 ms for one, this file 3.5 and 2.8, which is the bandwidth.
//
// A row's result does not depend, to the last bit, on the rows beside it: every product of two vectors is summed in the
// same order, in float32, or exactly, whatever the block that it is computed in. By AMX that holds among few rows, and
// among many, of int8 (from kManyRows on) and of float32 (kManyFloats).

#include "many_rows.h"

namespace {

// What is not worth another thread's waking, in bytes of the weight.
constexpr int64_t kSmallestPart = 1 << 16;
// The same, in elements of x, of writing it as tiles.
[[maybe_unused]] constexpr int64_t kSmallestFill = 1 << 13;

using Multiply = decltype(&multiply<Wide, int8_t, float>);

// For x, a weight and y of these dtypes; null: there is none.
Multiply choose(ffi::DataType x, ffi::DataType weight, ffi::DataType y) {
  bool narrow = y == ffi::BF16;
  if (!narrow && y != ffi::F32) return nullptr;
  if (x == ffi::F32 && weight == ffi::F32 && !narrow) return multiply<Wide, float, float>;
  if (x == ffi::F32 && weight == ffi::S8 && !narrow) return multiply<Wide, int8_t, float>;
#ifdef __AVX512BF16__
  if (x == ffi::BF16 && weight == ffi::S8 && !narrow) return multiply<Pairs, int8_t, float>;
  if (x == ffi::BF16 && weight == ffi::BF16)
    return narrow ? multiply<Pairs, bfloat16, bfloat16> : multiply<Pairs, bfloat16, float>;
#else
  if (x == ffi::F32 && weight == ffi::BF16)
    return narrow ? multiply<Wide, bfloat16, bfloat16> : multiply<Wide, bfloat16, float>;
#endif
  return nullptr;
}

// How many parts to make of a work of this size; 1 at least, whatever the pool says.
int64_t parts_of(ffi::ThreadPool& pool, int64_t size, int64_t smallest) {
  return std::clamp<int64_t>(pool.num_threads(), 1, std::max<int64_t>(size / smallest, 1));
}

// Calls product(begin, end) for all outputs, in parts that begin at a multiple of 16, as tiles do.
template <typename Product>
void share_out(ffi::ThreadPool& pool, Shape shape, int64_t weight_bytes, Product product) {
  const int64_t parts = parts_of(pool, weight_bytes, kSmallestPart);
  auto edge = [=](int64_t part) { return part == parts ? shape.out : shape.out * part / parts & -16; };
  in_parts(pool, parts, [=](int64_t part) { product(edge(part), edge(part + 1)); });
}

#ifdef __AMX_TILE__
// The fewest rows for which many_rows.h is faster than tiles.h, and of float32 than vectors are.
constexpr int64_t kManyRows = 65, kManyFloats = 17;
// A copy of so many, at most, is made: 6 bytes of each number of float32.
constexpr int64_t kMostRowsAtOnce = 4096;

template <typename Weight, typename Element, typename Result>
bool multiply_many_rows(ffi::ThreadPool& pool, const void* weight, const void* x, void* y, Shape shape) {
  using Rows = ManyRows<Weight, Element, Result>;
  if (!Rows::take(shape.in)) return false;
  for (int64_t row = 0; row < shape.rows; row += kMostRowsAtOnce) {
    const Shape own{std::min(kMostRowsAtOnce, shape.rows - row), shape.in, shape.out};
    const Rows rows(static_cast<const Element*>(x) + row * shape.in, static_cast<const Weight*>(weight),
                    static_cast<Result*>(y) + row * shape.out, own, pool.num_threads());
    in_parts(pool, rows.blocks(), [&rows](int64_t block) { rows.fill(block); });
    in_parts(pool, rows.parts(), [&rows](int64_t part) { rows.multiply(part); });
  }
  return true;
}

// y of all rows by tiles, of some rows after others; false where they do not take such a width.
template <typename Weight, typename Element, typename Result>
bool multiply_in_tiles(ffi::ThreadPool& pool, const void* weight_data, const void* x_data, void* y_data, Shape shape) {
  if (shape.rows >= kManyRows && multiply_many_rows<Weight, Element, Result>(pool, weight_data, x_data, y_data, shape))
    return true;
  using Rows = Tiles<Weight, Element>;
  if (!Rows::take(shape.in)) return false;
  auto weight = static_cast<const Weight*>(weight_data);
  auto x = static_cast<const Element*>(x_data);
  auto y = static_cast<Result*>(y_data);
  const int64_t most = Rows::most_rows(shape.in);
  for (int64_t row = 0; row < shape.rows; row += most) {
    const int64_t rows = std::min(most, shape.rows - row);
    const Rows tiles(x + row * shape.in, Shape{rows, shape.in, shape.out});
    const int64_t fills = parts_of(pool, rows * shape.in, kSmallestFill);
    in_parts(pool, fills, [&tiles, fills](int64_t part) {
      tiles.fill(tiles.steps() * part / fills, tiles.steps() * (part + 1) / fills);
    });
    share_out(pool, shape, shape.in * shape.out * sizeof(Weight), [=, &tiles](int64_t begin, int64_t end) {
      tiles.multiply(weight, y + row * shape.out, begin, end);
    });
  }
  return true;
}
#endif

ffi::Error products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> y) {
  auto sizes = weight.dimensions();
  if (sizes.size() != 2 || x.dimensions().size() != 2 || x.dimensions()[1] != sizes[1] ||
      static_cast<int64_t>(y->element_count()) != x.dimensions()[0] * sizes[0])
    return ffi::Error::InvalidArgument("products: x is [rows, in], the weight [out, in] and the result [rows, out]");
  Multiply product = choose(x.element_type(), weight.element_type(), y->element_type());
  if (product == nullptr) return ffi::Error::InvalidArgument("products: there are none of such dtypes");
  Shape shape{x.dimensions()[0], sizes[1], sizes[0]};
  auto from = weight.untyped_data(), rows = x.untyped_data(), to = y->untyped_data();
#ifdef __AMX_TILE__
  using InTiles = decltype(&multiply_in_tiles<bfloat16, bfloat16, float>);
  InTiles in_tiles = nullptr;
  if (weight.element_type() == ffi::F32)
    in_tiles = shape.rows >= kManyFloats ? &multiply_many_rows<float, float, float> : nullptr;
  else if (weight.element_type() == ffi::S8)
    in_tiles = x.element_type() == ffi::F32 ? &multiply_in_tiles<int8_t, float, float>
                                            : &multiply_in_tiles<int8_t, bfloat16, float>;
  else
    in_tiles = y->element_type() == ffi::F32 ? &multiply_in_tiles<bfloat16, bfloat16, float>
                                             : &multiply_in_tiles<bfloat16, bfloat16, bfloat16>;
  if (in_tiles != nullptr && in_tiles(pool, from, rows, to, shape)) return ffi::Error::Success();
#endif
  share_out(pool, shape, weight.size_bytes(),
            [=](int64_t begin, int64_t end) { product(from, rows, to, shape, begin, end); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
