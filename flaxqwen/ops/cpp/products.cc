// Products of rows with weights as an XLA custom call for CPUs: x [rows, in] weight [out, in]^T = y [rows, out]; of
// several weights beside each other, as the results of one.
//
// At a few rows such a product is one pass over the weight, and memory is its limit. XLA's own products wait for memory
// and then compute, because its code has no prefetch instructions: on 2 cores of a Zen 5, 24 weights of 4,864 x 896 in
// bfloat16 take it 9.7 ms for 8 rows and 4.3 ms for one, this file 3.5 and 2.8, which is the bandwidth.
//
// A row's result does not depend, to the last bit, on the rows beside it: every product of two vectors is summed in the
// same order, in float32, or exactly, whatever the block that it is computed in. By AMX that holds among few rows, and
// among many, of int8 (from kManyRows on) and of float32 (kManyFloats).

#include "few_rows.h"

#include <vector>

namespace {

struct Matrix {
  const void* data;
  int64_t out;
};

#ifdef __AMX_TILE__
// The fewest rows for which many_rows.h is faster than tiles.h, and of float32 than vectors are.
constexpr int64_t kManyRows = 65, kManyFloats = 17;
// A copy of so many, at most, is made: 6 bytes of each number of float32.
constexpr int64_t kMostRowsAtOnce = 4096;

// Not where there are too few rows, or of another width than it takes.
template <typename Weight>
bool are_many(Shape shape) {
  return shape.rows >= (std::is_same_v<Weight, float> ? kManyFloats : kManyRows) && shape.in > 0 &&
         shape.in % kStep == 0;
}

// False where too little memory is lent.
template <typename Weight, typename Element, typename Result>
bool multiply_many_rows(ffi::ThreadPool& pool, const Element* x, const void* weight, Result* y, Shape shape,
                        Lent lent) {
  using Rows = ManyRows<Weight, Element, Result>;
  if (Rows::bytes(std::min(kMostRowsAtOnce, shape.rows), shape.in) > lent.bytes) return false;
  for (int64_t row = 0; row < shape.rows; row += kMostRowsAtOnce) {
    const Shape own{std::min(kMostRowsAtOnce, shape.rows - row), shape.in, shape.out};
    const Rows rows(x + row * shape.in, static_cast<const Weight*>(weight), y + row * shape.out, own, lent.lines,
                    pool.num_threads());
    in_parts(pool, rows.blocks(), [&rows](int64_t block) { rows.fill(block); });
    in_parts(pool, rows.parts(), [&rows](int64_t part) { rows.multiply(part); });
  }
  return true;
}
#endif

// False where too little memory is lent.
template <typename Products, typename Weight, typename Result>
bool multiply_all(ffi::ThreadPool& pool, const void* x_data, const std::vector<Matrix>& weights, void* y_data,
                  Shape shape, [[maybe_unused]] Lent lent) {
  auto x = static_cast<const typename Products::Element*>(x_data);
  auto y = static_cast<Result*>(y_data);
#ifdef __AMX_TILE__
  if (weights.size() == 1 && are_many<Weight>(shape))
    return multiply_many_rows<Weight>(pool, x, weights[0].data, y, shape, lent);
#endif
  const Cut cut(pool, shape.out, shape.out * shape.in * sizeof(Weight));
  auto run = [=, &weights](auto product, int64_t row, int64_t, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Matrix& weight : weights) {
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, weight.out);
      if (from < to) product(static_cast<const Weight*>(weight.data), y + row * shape.out + first, from, to);
      first += weight.out;
    }
  };
  multiply_in_parts<Products, Weight, Result>(pool, x, shape, cut, run);
  return true;
}

ffi::Error products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::RemainingArgs others,
                    ffi::Result<ffi::AnyBuffer> y, ffi::RemainingRets lent) {
  const auto wrong = ffi::Error::InvalidArgument(
      "products: x is [rows, in], the weights [out, in], of one dtype, and the result [rows, all outs]");
  if (x.dimensions().size() != 2 || weight.dimensions().size() != 2) return wrong;
  Shape shape{x.dimensions()[0], x.dimensions()[1], 0};
  std::vector<Matrix> weights;
  for (size_t i = 0; i <= others.size(); i++) {
    auto each = i == 0 ? ffi::ErrorOr<ffi::AnyBuffer>(weight) : others.get<ffi::AnyBuffer>(i - 1);
    if (!each.has_value() || each->dimensions().size() != 2 || each->dimensions()[1] != shape.in ||
        each->element_type() != weight.element_type())
      return wrong;
    weights.push_back({each->untyped_data(), each->dimensions()[0]});
    shape.out += each->dimensions()[0];
  }
  if (static_cast<int64_t>(y->element_count()) != shape.rows * shape.out) return wrong;
  bool is_enough = true;
  const bool are_there = with_types(x.element_type(), weight.element_type(), y->element_type(),
                                    [&]<typename Products, typename Weight, typename Result>() {
                                      is_enough = multiply_all<Products, Weight, Result>(
                                          pool, x.untyped_data(), weights, y->untyped_data(), shape, Lent(lent));
                                    });
  if (!is_enough) return ffi::Error::InvalidArgument("products: there is too little memory for a copy of x");
  return are_there ? ffi::Error::Success() : ffi::Error::InvalidArgument("products: there are none of such dtypes");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());
