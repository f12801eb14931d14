// Products of a few rows with a weight as an XLA custom call for CPUs: x [rows, in] weight [out, in]^T = y [rows, out].
//
// At a few rows such a product is one pass over the weight, and memory is its limit. XLA's own products wait for memory
// and then compute, because its code has no prefetch instructions: on 2 cores of a Zen 5, 24 weights of 4,864 x 896 in
// bfloat16 take it 9.7 ms for 8 rows and 4.3 ms for one, this file 3.5 and 2.8, which is the bandwidth.
//
// A row's result does not depend, to the last bit, on the rows beside it: every product of two vectors is summed in the
// same order, in float32, whatever the block that it is computed in.

#include "tiles.h"

namespace {

// What is not worth another thread's waking, in bytes of the weight.
constexpr int64_t kSmallestPart = 1 << 16;
#ifdef __AMX_TILE__
// The same of writing x's tiles, in elements of x.
constexpr int64_t kSmallestFill = 1 << 13;
#endif

using Multiply = decltype(&multiply<Wide, int8_t>);

// For x and a weight of these dtypes; null: there is none.
Multiply choose(ffi::DataType x, ffi::DataType weight) {
  if (x == ffi::F32 && weight == ffi::S8) return multiply<Wide, int8_t>;
#ifdef __AVX512BF16__
  if (x == ffi::BF16 && weight == ffi::S8) return multiply<Pairs, int8_t>;
  if (x == ffi::BF16 && weight == ffi::BF16) return multiply<Pairs, bfloat16>;
#else
  if (x == ffi::F32 && weight == ffi::BF16) return multiply<Wide, bfloat16>;
#endif
  return nullptr;
}

ffi::Error few_rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::ResultBuffer<ffi::F32> y) {
  auto sizes = weight.dimensions();
  if (sizes.size() != 2 || x.dimensions().size() != 2 || x.dimensions()[1] != sizes[1] ||
      static_cast<int64_t>(y->element_count()) != x.dimensions()[0] * sizes[0])
    return ffi::Error::InvalidArgument("few_rows: x is [rows, in], the weight [out, in] and the result [rows, out]");
  Shape shape{x.dimensions()[0], sizes[1], sizes[0]};
  int64_t most = std::max<int64_t>(weight.size_bytes() / kSmallestPart, 1);
  int64_t parts = std::clamp<int64_t>(pool.num_threads(), 1, most);
  // product(begin, end) of all outputs, in parts that begin at a multiple of 16, as tiles do.
  auto share_out = [&](auto product) {
    auto edge = [=](int64_t part) { return part == parts ? shape.out : shape.out * part / parts & -16; };
    in_parts(pool, parts, [=](int64_t part) { product(edge(part), edge(part + 1)); });
    return ffi::Error::Success();
  };
  auto from = weight.untyped_data(), rows = x.untyped_data();
  float* to = y->typed_data();
#ifdef __AMX_TILE__
  auto in_tiles = [&]<typename Weight, typename Element>(const Weight* weight, const Element* x) {
    const Tiles<Weight, Element> tiles(x, shape);
    int64_t fills = std::clamp<int64_t>(shape.rows * shape.in / kSmallestFill, 1, parts);
    in_parts(pool, fills, [&tiles, fills](int64_t part) {
      tiles.fill(tiles.steps() * part / fills, tiles.steps() * (part + 1) / fills);
    });
    return share_out([=, &tiles](int64_t begin, int64_t end) { tiles.multiply(weight, to, begin, end); });
  };
  if (x.element_type() == ffi::BF16 && weight.element_type() == ffi::BF16 && Tiles<bfloat16, bfloat16>::take(shape))
    return in_tiles(static_cast<bfloat16*>(from), static_cast<bfloat16*>(rows));
  if (x.element_type() == ffi::BF16 && weight.element_type() == ffi::S8 && Tiles<int8_t, bfloat16>::take(shape))
    return in_tiles(static_cast<int8_t*>(from), static_cast<bfloat16*>(rows));
  if (x.element_type() == ffi::F32 && weight.element_type() == ffi::S8 && Tiles<int8_t, float>::take(shape))
    return in_tiles(static_cast<int8_t*>(from), static_cast<float*>(rows));
#endif
  Multiply product = choose(x.element_type(), weight.element_type());
  if (product == nullptr) return ffi::Error::InvalidArgument("few_rows: no products of such dtypes");
  return share_out([=](int64_t begin, int64_t end) { product(from, rows, to, shape, begin, end); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, few_rows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
