// Attention of one new token of each row to its keys and values in the cache, as an XLA custom call for CPUs.
//
// Each key and value is read once, in the cache's dtype, and only those slots that the row may see: not the others of
// the cache's capacity. Scores stand in memory for a few slots at a time: the softmax is the online one of Milakov and
// Gimelshein (2018), in float32, and where there are more threads than heads the slots are shared out among them and
// the parts brought together, as in Flash-Decoding (Dao et al., 2023).
//
// Axes: B rows, N query heads, K key/value heads, G = N / K, C capacity, S slots that have a place in the mask, H dim.

#include "common.h"

#include <cmath>
#include <limits>
#include <vector>

namespace {

// Slots at a time, and the fewest of a part.
constexpr int kSlots = 64;
constexpr int64_t kSmallestPart = 512;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// e^x for x <= 0: 2^n e^r with n an integer and |r| <= ln(2) / 2, by Taylor's polynomial; 0 below -87. Off by 2e-7 of it.
INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  float bounded = x < -87.0f ? -87.0f : x;
  float n = std::fma(bounded, 1.44269504f, kRound) - kRound;
  float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, bounded));
  float p = std::fma(1.0f / 5040, r, 1.0f / 720);  // a loop over the factors would not be vectorised
  p = std::fma(p, r, 1.0f / 120);
  p = std::fma(p, r, 1.0f / 24);
  p = std::fma(p, r, 1.0f / 6);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  int32_t bits = x < -87.0f ? 0 : (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// The largest of kSlots numbers, in as many runs beside each other as a vector has lanes.
INLINE float largest_of(const float* row) {
  float most[Wide::kLanes];
  std::copy_n(row, Wide::kLanes, most);
  for (int i = Wide::kLanes; i < kSlots; i += Wide::kLanes)
    for (int lane = 0; lane < Wide::kLanes; lane++) most[lane] = most[lane] < row[i + lane] ? row[i + lane] : most[lane];
  return *std::max_element(most, most + Wide::kLanes);
}

struct Sizes {
  int64_t kv_heads, group, capacity, slots, dim;
};

// What the G queries of a key/value head have seen so far: the largest score, the sum of e^(score - largest), and the
// sum of the values [G, H] that are weighted so.
struct Seen {
  float *largest, *sum, *values;

  static int64_t size(const Sizes& sizes) { return sizes.group * (sizes.dim + 2); }

  Seen(float* memory, const Sizes& sizes)
      : largest(memory), sum(memory + sizes.group), values(memory + 2 * sizes.group) {}

  void clear(const Sizes& sizes) {
    std::fill_n(largest, sizes.group, kUnseen);
    std::fill_n(sum, (sizes.dim + 1) * sizes.group, 0.0f);
  }

  // Takes over scores of `group` queries, one for each row of kSlots: they become e^(score - largest).
  void take(float* scores, const Sizes& sizes) {
    for (int64_t g = 0; g < sizes.group; g++) {
      float* row = scores + g * kSlots;
      float most = std::max(largest[g], largest_of(row));
      if (most == kUnseen) {
        std::fill_n(row, kSlots, 0.0f);
        continue;
      }
      rescale(g, exp_of(largest[g] - most), sizes);
      largest[g] = most;
      for (int i = 0; i < kSlots; i++) row[i] = exp_of(row[i] - most);
      auto sums = Wide::zeros();
      for (int i = 0; i < kSlots; i += Wide::kLanes) sums = Wide::add_products(sums, Wide::load(row + i), Wide::all(1));
      sum[g] += Wide::total(sums);
    }
  }

  void rescale(int64_t g, float factor, const Sizes& sizes) {
    sum[g] *= factor;
    for (int64_t h = 0; h < sizes.dim; h++) values[g * sizes.dim + h] *= factor;
  }

  // Adds what other queries of the same head have seen, of other slots.
  void add(Seen& other, const Sizes& sizes) {
    for (int64_t g = 0; g < sizes.group; g++) {
      if (other.largest[g] == kUnseen) continue;
      float most = std::max(largest[g], other.largest[g]);
      rescale(g, exp_of(largest[g] - most), sizes);
      other.rescale(g, exp_of(other.largest[g] - most), sizes);
      largest[g] = most;
      sum[g] += other.sum[g];
      for (int64_t i = g * sizes.dim; i < (g + 1) * sizes.dim; i++) values[i] += other.values[i];
    }
  }
};

// values [group, dim] += weights [group, kSlots] times value [count, dim].
template <int group, typename Cache>
INLINE void add_values(float* values, const float* weights, const Cache* value, int64_t count, int64_t dim) {
  for (int64_t h = 0; h < dim; h += Wide::kLanes) {
    Wide::Sums sums[group];
    for (int g = 0; g < group; g++) sums[g] = Wide::load(values + g * dim + h);
    for (int64_t i = 0; i < count; i++) {
      __builtin_prefetch(value + (i + kSlots) * dim + h);
      auto vector = Wide::load(value + i * dim + h);
#pragma GCC unroll 8
      for (int g = 0; g < group; g++)
        sums[g] = Wide::add_products(sums[g], vector, Wide::all(weights[g * kSlots + i]));
    }
    for (int g = 0; g < group; g++) Wide::store(values + g * dim + h, sums[g]);
  }
}

// The same for a group of any size, `most` at a time and the rest at once.
template <int most, typename Cache>
INLINE void add_all_values(float* values, const float* weights, const Cache* value, int64_t group, int64_t count,
                           int64_t dim) {
  for (; group >= most; group -= most, values += most * dim, weights += most * kSlots)
    add_values<most>(values, weights, value, count, dim);
  if constexpr (most > 1) add_all_values<most - 1>(values, weights, value, group, count, dim);
}

// Queries [G, H] over the slots from `begin` to `end` of keys and values [C, H], of which the mask [S] hides some.
template <typename Cache>
void attend(const float* query, const void* keys, const void* values, const bool* mask, int64_t begin, int64_t end,
            const Sizes& sizes, Seen seen) {
  std::vector<float> scores(sizes.group * kSlots), scaled(query, query + sizes.group * sizes.dim);
  for (float& x : scaled) x /= std::sqrt(static_cast<float>(sizes.dim));
  seen.clear(sizes);
  for (int64_t slot = begin; slot < end; slot += kSlots) {
    int64_t count = std::min<int64_t>(kSlots, end - slot);
    auto key = static_cast<const Cache*>(keys) + slot * sizes.dim;
    multiply<Wide, Cache>(key, scaled.data(), scores.data(), Shape{sizes.group, sizes.dim, kSlots}, 0, count);
    float hidden[kSlots];
    for (int64_t i = 0; i < kSlots; i++) hidden[i] = i < count && mask[slot + i] ? 0 : kUnseen;
    for (int64_t g = 0; g < sizes.group; g++)
      for (int64_t i = 0; i < kSlots; i++) scores[g * kSlots + i] += hidden[i];
    seen.take(scores.data(), sizes);
    auto value = static_cast<const Cache*>(values) + slot * sizes.dim;
    add_all_values<8>(seen.values, scores.data(), value, sizes.group, count, sizes.dim);
  }
}

using Heads = ffi::Buffer<ffi::F32, 3>;
using Slots = ffi::Buffer<ffi::S32, 1>;
using Mask = ffi::Buffer<ffi::PRED, 2>;

ffi::Error decode_attention(ffi::ThreadPool pool, Heads query, ffi::AnyBuffer key, ffi::AnyBuffer value, Slots begin,
                            Slots end, Mask mask, ffi::Result<Heads> y) {
  auto cache = key.dimensions();
  if (cache.size() != 4 || key.element_type() != value.element_type() || cache[3] % Wide::kLanes != 0)
    return ffi::Error::InvalidArgument("decode_attention: keys and values are [B, K, C, H] of one dtype");
  auto attend_in = key.element_type() == ffi::F32 ? attend<float> : attend<bfloat16>;
  const Sizes sizes{cache[1], query.dimensions()[1] / cache[1], cache[2], mask.dimensions()[1], cache[3]};
  const int64_t heads = cache[0] * cache[1], mask_rows = mask.dimensions()[0];
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t most = std::max<int64_t>(sizes.slots / kSmallestPart, 1);
  const int64_t splits = std::clamp<int64_t>(threads / std::max<int64_t>(heads, 1), 1, most);
  std::vector<float> memory(heads * splits * Seen::size(sizes));
  auto seen_of = [&](int64_t part) { return Seen(memory.data() + part * Seen::size(sizes), sizes); };

  in_parts(pool, heads * splits, [&](int64_t part) {
    int64_t head = part / splits, split = part % splits, row = head / sizes.kv_heads;
    int64_t first = std::max(begin.typed_data()[row], 0);
    int64_t count = std::max<int64_t>(std::min<int64_t>(end.typed_data()[row], sizes.slots) - first, 0);
    int64_t bytes = head * sizes.capacity * sizes.dim * (key.element_type() == ffi::F32 ? 4 : 2);
    attend_in(query.typed_data() + head * sizes.group * sizes.dim, static_cast<const char*>(key.untyped_data()) + bytes,
              static_cast<const char*>(value.untyped_data()) + bytes,
              mask.typed_data() + row % mask_rows * sizes.slots, first + count * split / splits,
              first + count * (split + 1) / splits, sizes, seen_of(part));
  });

  for (int64_t head = 0; head < heads; head++) {
    Seen seen = seen_of(head * splits);
    for (int64_t split = 1; split < splits; split++) {
      Seen other = seen_of(head * splits + split);
      seen.add(other, sizes);
    }
    for (int64_t i = 0; i < sizes.group * sizes.dim; i++) {
      float sum = seen.sum[i / sizes.dim];
      y->typed_data()[head * sizes.group * sizes.dim + i] = sum == 0 ? 0 : seen.values[i] / sum;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, decode_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Heads>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Slots>()
                                  .Arg<Slots>()
                                  .Arg<Mask>()
                                  .Ret<Heads>());
