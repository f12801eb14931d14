// Attention of one new token of each row to its keys and values in the cache, as an XLA custom call for CPUs.
//
// Each key and value is read once, in the cache's dtype, from the first to the last slot that its row may see: not the
// rest of the cache's capacity. Scores stand in memory for a few slots at a time: the softmax is the online one of
// Milakov and Gimelshein (2018), in float32. Slots are read in parts, which threads share out among them, and what the
// parts have seen is brought together, as in Flash-Decoding (Dao et al., 2023). Where a part begins depends on nothing
// but its number: a row's result is the same to the last bit whatever rows and threads there are.
//
// Axes: B rows, N query heads, K key/value heads, G = N / K, C capacity, S slots that have a place in the mask, H dim.

#include "softmax.h"

namespace {

// Slots at a time, and slots of a part, a multiple of them.
constexpr int kSlots = 64;
constexpr int64_t kPart = 512;

// The largest of kSlots numbers that are one, in as many runs beside each other as a vector has lanes.
INLINE float largest_of(const float* row) {
  float most[Wide::kLanes];
  std::fill_n(most, Wide::kLanes, kUnseen);
  for (int i = 0; i < kSlots; i += Wide::kLanes)
    for (int lane = 0; lane < Wide::kLanes; lane++)
      most[lane] = most[lane] < row[i + lane] ? row[i + lane] : most[lane];
  return *std::max_element(most, most + Wide::kLanes);
}

struct Sizes {
  int64_t rows, kv_heads, group, capacity, mask_rows, slots, dim;
};

// What the G queries of a key/value head have seen of a part: the largest score, the sum of e^(score - largest), and
// the sum of the values [G, H] that are weighted so. Beside it, memory for queries [G, H] and scores [G, kSlots].
struct Seen {
  float *largest, *sum, *values, *query, *scores;

  static int64_t size(const Sizes& sizes) { return sizes.group * (2 * sizes.dim + kSlots + 2); }

  Seen(float* memory, const Sizes& sizes)
      : largest(memory),
        sum(largest + sizes.group),
        values(sum + sizes.group),
        query(values + sizes.group * sizes.dim),
        scores(query + sizes.group * sizes.dim) {}

  void clear(const Sizes& sizes) {
    std::fill_n(largest, sizes.group, kUnseen);
    std::fill_n(sum, (sizes.dim + 1) * sizes.group, 0.0f);
    std::fill_n(scores, sizes.group * kSlots, 0.0f);
  }

  // Takes over the scores, which become e^(score - largest).
  void take_scores(const Sizes& sizes) {
    for (int64_t g = 0; g < sizes.group; g++) {
      float* row = scores + g * kSlots;
      float most = std::max(largest[g], largest_of(row));
      if (most == kUnseen) {  // nothing but slots that are not seen, and scores that are NaN, which stay so
        for (int i = 0; i < kSlots; i++) row[i] = row[i] == kUnseen ? 0.0f : row[i];
      } else {
        rescale(g, exp_of(largest[g] - most), sizes);
        largest[g] = most;
        for (int i = 0; i < kSlots; i++) row[i] = exp_of(row[i] - most);
      }
      auto sums = Wide::zeros();
      for (int i = 0; i < kSlots; i += Wide::kLanes) sums = Wide::add_products(sums, Wide::load(row + i), Wide::all(1));
      sum[g] += Wide::total(sums);
    }
  }

  void rescale(int64_t g, float factor, const Sizes& sizes) {
    sum[g] *= factor;
    for (int64_t h = 0; h < sizes.dim; h++) values[g * sizes.dim + h] *= factor;
  }

  // Adds what the same queries have seen of another part.
  void add(Seen other, const Sizes& sizes) {
    for (int64_t g = 0; g < sizes.group; g++) {
      float most = std::max(largest[g], other.largest[g]);
      if (most != kUnseen) {
        rescale(g, exp_of(largest[g] - most), sizes);
        other.rescale(g, exp_of(other.largest[g] - most), sizes);
      }
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
  seen.clear(sizes);
  const float scale = 1 / std::sqrt(static_cast<float>(sizes.dim));
  for (int64_t i = 0; i < sizes.group * sizes.dim; i++) seen.query[i] = query[i] * scale;
  for (int64_t slot = begin; slot < end; slot += kSlots) {
    int64_t count = std::min<int64_t>(kSlots, end - slot);
    auto key = static_cast<const Cache*>(keys) + slot * sizes.dim;
    multiply<Wide, Cache, float>(key, seen.query, seen.scores, Shape{sizes.group, sizes.dim, kSlots}, 0, count);
    int32_t is_seen[kSlots];
    for (int64_t i = 0; i < kSlots; i++) is_seen[i] = i < count && mask[slot + i];
    for (int64_t g = 0; g < sizes.group; g++)
      for (int64_t i = 0; i < kSlots; i++)
        seen.scores[g * kSlots + i] = is_seen[i] ? seen.scores[g * kSlots + i] : kUnseen;
    seen.take_scores(sizes);
    auto value = static_cast<const Cache*>(values) + slot * sizes.dim;
    add_all_values<8>(seen.values, seen.scores, value, sizes.group, count, sizes.dim);
  }
}

using Heads = ffi::Buffer<ffi::F32, 3>;
using Slots = ffi::Buffer<ffi::S32, 1>;
using Mask = ffi::Buffer<ffi::PRED, 2>;

// Whether the shapes and dtypes go together: query and y [B, N, H], key and value [B, K, C, H], begin and end [B], mask
// [1 or B, S] with S at most C.
bool go_together(Heads query, ffi::AnyBuffer key, ffi::AnyBuffer value, Slots begin, Slots end, Mask mask, Heads y) {
  auto heads = query.dimensions(), cache = key.dimensions(), seen = mask.dimensions();
  auto type = key.element_type();
  if (cache.size() != 4 || cache[1] == 0 || value.dimensions() != cache || y.dimensions() != heads) return false;
  return (type == ffi::F32 || type == ffi::BF16) && value.element_type() == type && heads[0] == cache[0] &&
         heads[1] % cache[1] == 0 && heads[2] == cache[3] && cache[3] % Wide::kLanes == 0 &&
         begin.dimensions()[0] == cache[0] && end.dimensions()[0] == cache[0] && seen[1] <= cache[2] &&
         (seen[0] == 1 || seen[0] == cache[0]);
}

ffi::Error decode_attention(ffi::ThreadPool pool, Heads query, ffi::AnyBuffer key, ffi::AnyBuffer value, Slots begin,
                            Slots end, Mask mask, ffi::Result<Heads> y) {
  if (!go_together(query, key, value, begin, end, mask, *y))
    return ffi::Error::InvalidArgument("decode_attention: shapes or dtypes that do not go together");
  auto cache = key.dimensions(), seen_by = mask.dimensions();
  const Sizes sizes{cache[0], cache[1], query.dimensions()[1] / cache[1], cache[2], seen_by[0], seen_by[1], cache[3]};
  const int64_t heads = sizes.rows * sizes.kv_heads, queries = sizes.group * sizes.dim;
  int64_t first = sizes.slots, last = 0;
  for (int64_t row = 0; row < sizes.rows; row++) {
    first = std::min<int64_t>(first, std::max(begin.typed_data()[row], 0));
    last = std::max<int64_t>(last, std::min<int64_t>(end.typed_data()[row], sizes.slots));
  }
  first = std::min(first, last) / kPart;  // from here on of parts
  const int64_t parts = std::max<int64_t>((last + kPart - 1) / kPart - first, 1);
  auto memory = std::make_unique_for_overwrite<float[]>(heads * parts * Seen::size(sizes));
  auto seen_of = [&](int64_t index) { return Seen(memory.get() + index * Seen::size(sizes), sizes); };
  auto attend_in = key.element_type() == ffi::F32 ? attend<float> : attend<bfloat16>;
  const int64_t head_bytes = sizes.capacity * sizes.dim * (key.element_type() == ffi::F32 ? 4 : 2);

  in_parts(pool, heads * parts, [&](int64_t index) {
    int64_t head = index / parts, row = head / sizes.kv_heads, from = (first + index % parts) * kPart;
    int64_t stop = std::min<int64_t>({from + kPart, end.typed_data()[row], sizes.slots});
    attend_in(query.typed_data() + head * queries, static_cast<const char*>(key.untyped_data()) + head * head_bytes,
              static_cast<const char*>(value.untyped_data()) + head * head_bytes,
              mask.typed_data() + row % sizes.mask_rows * sizes.slots,
              std::max<int64_t>(from, begin.typed_data()[row]), stop, sizes, seen_of(index));
  });

  for (int64_t head = 0; head < heads; head++) {
    Seen seen = seen_of(head * parts);
    for (int64_t part = 1; part < parts; part++) seen.add(seen_of(head * parts + part), sizes);
    for (int64_t i = 0; i < queries; i++) {
      float sum = seen.sum[i / sizes.dim];
      y->typed_data()[head * queries + i] = sum == 0 ? 0 : seen.values[i] / sum;
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
