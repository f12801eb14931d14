// The place of the first of the largest numbers of each row, as an XLA custom call for CPUs.
//
// XLA's reductions of 151,936 numbers are shared out among threads, which are woken four times for what one thread that
// has the numbers in its cache does in 20 us: to choose a token takes them 1.1 ms, of a step's 45 (0.5B, 2 cores).

#include "common.h"

#include <limits>

namespace {

// Numbers that are looked at together.
constexpr int64_t kBlock = 64;

// Whether one of kBlock numbers is `wanted`.
template <typename Number>
INLINE bool has(const Number* p, float wanted) {
  int32_t found = 0;
  for (int64_t i = 0; i < kBlock; i++) found |= to_float(p[i]) == wanted;
  return found;
}

// Where there is NaN it is the last place, as of ops/largest.py.
template <typename Number>
int64_t place_of(const Number* row, int64_t size) {
  constexpr int kLanes = 4 * Wide::kLanes;
  float most[kLanes];
  int32_t is_odd[kLanes] = {};
  std::fill_n(most, kLanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int lane = 0; lane < kLanes; lane++) {
      const float number = to_float(row[i + lane]);
      most[lane] = most[lane] < number ? number : most[lane];
      is_odd[lane] |= number != number;
    }
  float largest = *std::max_element(most, most + kLanes);
  int32_t odd = *std::max_element(is_odd, is_odd + kLanes);
  for (; i < size; i++) {
    largest = std::max(largest, to_float(row[i]));
    odd |= to_float(row[i]) != to_float(row[i]);
  }
  if (odd) return size - 1;
  for (i = 0; i + kBlock <= size && !has(row + i, largest);) i += kBlock;
  while (to_float(row[i]) != largest) i++;
  return i;
}

using Places = ffi::Buffer<ffi::S32, 1>;

ffi::Error first_largest(ffi::ThreadPool pool, ffi::AnyBuffer numbers, ffi::Result<Places> places) {
  auto sizes = numbers.dimensions();
  const auto type = numbers.element_type();
  if (sizes.size() != 2 || sizes[1] == 0 || static_cast<int64_t>(places->element_count()) != sizes[0] ||
      (type != ffi::F32 && type != ffi::BF16))
    return ffi::Error::InvalidArgument("first_largest: numbers are [rows, size] of float32 or bfloat16, places [rows]");
  auto from = numbers.untyped_data();
  int32_t* to = places->typed_data();
  in_parts(pool, sizes[0], [=, size = sizes[1]](int64_t row) {
    const bool is_wide = type == ffi::F32;
    to[row] = static_cast<int32_t>(is_wide ? place_of(static_cast<const float*>(from) + row * size, size)
                                           : place_of(static_cast<const bfloat16*>(from) + row * size, size));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FirstLargest, first_largest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<Places>());
