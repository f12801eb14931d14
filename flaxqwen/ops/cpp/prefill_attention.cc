// Attention of a prompt's tokens to their keys and values in the cache, as an XLA custom call for CPUs.
//
// As FlashAttention (Dao et al., 2022): the scores of kSlots slots and kColumns queries stand in a core's cache, and
// maxima and sums go on from slots to slots, in float32 (Milakov and Gimelshein 2018). Keys and values are packed
// first, from the first to the last block of slots that some query sees; a block of queries then takes those that it
// sees. Scores are [slots, queries]: the softmax is one of whole vectors. Queries of bfloat16 are multiplied with keys
// as such, and their weights with values; others as float32.
//
// A query's result is the same to the last bit whatever queries stand beside it and whatever threads there are.
//
// Axes: B rows, T new tokens, N query heads, K key/value heads, G = N / K, C capacity, S slots that have a place in
// slot_segment, H dim, W = H rounded up to a multiple of kRows.

#include "blocks.h"
#include "softmax.h"

namespace {

// Slots of a block.
constexpr int kSlots = 64;

struct Sizes {
  int64_t rows, tokens, kv_heads, group, capacity, slots, dim, width;
};

// Who sees whom: a token the slots from begin up to end that are of its segment. All [B, T] but slot_segment [B, S].
struct Visible {
  const int32_t *begin, *end, *segment, *slot_segment;
};

// The blocks of slots that some of `count` tokens see, if they are of their segment: from first up to last.
struct Span {
  int64_t first, last;

  Span(const int32_t* begin, const int32_t* end, int64_t count, int64_t slots) {
    first = std::max<int64_t>(*std::min_element(begin, begin + count), 0) / kSlots;
    last = (std::min<int64_t>(*std::max_element(end, end + count), slots) + kSlots - 1) / kSlots;
    last = std::max(first, last);
  }
};

// The keys and values of a block of slots, in the dtype of the products: keys [kSlots, W] and values [W, kSlots]. What
// is beyond the last slot, or H, is 0.
template <typename Element, typename Cache>
void pack(const Cache* key, const Cache* value, int64_t count, const Sizes& sizes, Element* to) {
  std::memset(to, 0, 2 * kSlots * sizes.width * sizeof *to);
  for (int64_t slot = 0; slot < count; slot++, key += sizes.dim)
    for (int64_t h = 0; h < sizes.dim; h++) round_to(to + slot * sizes.width + h, to_float(key[h]));
  to += kSlots * sizes.width;
  for (int64_t slot = 0; slot < count; slot++, value += sizes.dim)
    for (int64_t h = 0; h < sizes.dim; h++) round_to(to + h * kSlots + slot, to_float(value[h]));
}

// Two rows of weights as b has them in blocks.h, of one dtype or the other.
INLINE void put_pair(float* to, const float* low, const float* high) {
  std::memcpy(to, low, kColumns * sizeof *to);
  std::memcpy(to + kColumns, high, kColumns * sizeof *to);
}
#ifdef __AVX512BF16__
INLINE void put_pair(bfloat16* to, const float* low, const float* high) {
  for (int c = 0; c < kColumns; c += 16)
    _mm512_storeu_si512(to + 2 * c, pair_of(_mm512_loadu_ps(low + c), _mm512_loadu_ps(high + c)));
}
#endif

// Up to kColumns tokens of a row, with the G query heads of a key/value head.
template <typename Blocks>
class Queries {
  using Element = typename Blocks::Element;

 public:
  Queries(const Sizes& sizes, int64_t count)
      : sizes_(sizes),
        count_(count),
        memory_(std::make_unique_for_overwrite<Line[]>((sizes.group * head_size() + kSlots * kColumns * 5) / 16)) {}

  // query: of the first token and head; a token's heads lie beside each other, those of the next kv_heads * G further.
  template <typename Query>
  void take(const Query* query) {
    for (int64_t g = 0; g < sizes_.group; g++) {
      put_columns(query + g * sizes_.dim, stride(), count_, sizes_.dim, query_of(g));
      std::fill_n(sums_of(g), sizes_.width * kColumns, 0.0f);
      std::fill_n(largest_of(g), kColumns, kUnseen);
      std::fill_n(total_of(g), kColumns, 0.0f);
    }
  }

  // Of the block of slots from `slot` on, packed. The pointers of `visible` are at the first token and at slot 0.
  void attend(const Element* packed, const Visible& visible, int64_t slot) {
    const bool is_all_seen = see(visible, slot);
    const float scale = 1 / std::sqrt(static_cast<float>(sizes_.dim));
    // Heads are taken in turns, so that a product does not wait for what was written just before.
    score(packed, 0);
    for (int64_t g = 0; g < sizes_.group; g++) {
      if (g + 1 < sizes_.group) score(packed, g + 1);
      if (!is_all_seen) hide(g);
      weigh(g, scale);
      if (g > 0) add_values(packed, g - 1);
    }
    add_values(packed, sizes_.group - 1);
  }

  // y: as query. A token that saw nothing gives 0.
  template <typename Result>
  void put(Result* y) const {
    for (int64_t g = 0; g < sizes_.group; g++) {
      float *sums = sums_of(g), *total = total_of(g);
      for (int c = 0; c < kColumns; c++) total[c] = total[c] == 0 ? 1 : total[c];
      for (int64_t h = 0; h < sizes_.width; h++)
        for (int c = 0; c < kColumns; c++) sums[h * kColumns + c] /= total[c];
      for (int half = 0; half < kColumns; half += kHalf)
        for (int64_t h = 0; h < sizes_.dim; h += kRows) {
          Result* to = y + half * stride() + g * sizes_.dim + h;
          put_rows(sums + h * kColumns + half, to, stride(), count_ - half, sizes_.dim - h);
        }
    }
  }

 private:
  static constexpr int kWord = Blocks::kWord;

  int64_t stride() const { return sizes_.kv_heads * sizes_.group * sizes_.dim; }

  // Of each head: queries [W / kWord, kColumns] words, sums of values [W, kColumns], the largest score and the sum of
  // weights [kColumns]. Behind them scores and weights of two heads, and what is seen, [kSlots, kColumns] each.
  int64_t head_size() const { return (sizes_.width / kWord + sizes_.width + 2) * kColumns; }
  float* memory(int64_t g) const { return reinterpret_cast<float*>(memory_.get()) + g * head_size(); }
  Element* query_of(int64_t g) const { return reinterpret_cast<Element*>(memory(g)); }
  float* sums_of(int64_t g) const { return memory(g) + sizes_.width / kWord * kColumns; }
  float* largest_of(int64_t g) const { return sums_of(g) + sizes_.width * kColumns; }
  float* total_of(int64_t g) const { return largest_of(g) + kColumns; }
  float* scores_of(int64_t g) const { return memory(sizes_.group) + g % 2 * kSlots * kColumns; }
  Element* weights_of(int64_t g) const {
    return reinterpret_cast<Element*>(memory(sizes_.group) + (2 + g % 2) * kSlots * kColumns);
  }
  int32_t* is_seen() const { return reinterpret_cast<int32_t*>(memory(sizes_.group) + 4 * kSlots * kColumns); }

  void score(const Element* keys, int64_t g) {
    Blocks::template multiply<false>(scores_of(g), keys, sizes_.width, query_of(g), kSlots, sizes_.width / kWord);
  }

  void add_values(const Element* packed, int64_t g) {
    const Element* values = packed + kSlots * sizes_.width;
    Blocks::template multiply<true>(sums_of(g), values, kSlots, weights_of(g), sizes_.width, kSlots / kWord);
  }

  // Notes who sees which of a block's slots; whether all see all.
  bool see(const Visible& visible, int64_t slot) {
    const int64_t slots = std::min<int64_t>(kSlots, sizes_.slots - slot);
    int32_t begin[kColumns] = {}, end[kColumns] = {}, segment[kColumns] = {};
    std::copy_n(visible.begin, count_, begin);
    std::copy_n(visible.end, count_, end);
    std::copy_n(visible.segment, count_, segment);
    int32_t unseen = 0;
    for (int64_t i = 0; i < slots; i++)
      for (int c = 0; c < kColumns; c++) {
        int32_t seen = (slot + i >= begin[c]) & (slot + i < end[c]) & (visible.slot_segment[slot + i] == segment[c]);
        is_seen()[i * kColumns + c] = seen;
        unseen |= seen ^ 1;
      }
    std::fill_n(is_seen() + slots * kColumns, (kSlots - slots) * kColumns, 0);
    return !unseen && slots == kSlots;
  }

  void hide(int64_t g) {
    float* scores = scores_of(g);
    for (int i = 0; i < kSlots * kColumns; i++) scores[i] = is_seen()[i] ? scores[i] : kUnseen;
  }

  // Makes weights of a head's scores, e^(scale * (score - largest)), whose exponents are never above 0, and brings what
  // it has seen so far to them.
  void weigh(int64_t g, float scale) {
    float *scores = scores_of(g), *largest = largest_of(g), *total = total_of(g);
    float most[kColumns], factor[kColumns], changed = 0;
    std::fill_n(most, kColumns, kUnseen);
    for (int i = 0; i < kSlots; i++)
      for (int c = 0; c < kColumns; c++) {
        float score = scores[i * kColumns + c];
        most[c] = most[c] < score ? score : most[c];
      }
    for (int c = 0; c < kColumns; c++) {
      most[c] = std::max(largest[c], most[c]);
      float from = most[c] == kUnseen ? 0 : most[c];  // nothing is seen so far
      factor[c] = exp_of((largest[c] - from) * scale);
      changed += factor[c] != 1;
      largest[c] = most[c];
      most[c] = from;
      total[c] *= factor[c];
    }
    if (changed != 0)
      for (int64_t h = 0; h < sizes_.width; h++)
        for (int c = 0; c < kColumns; c++) sums_of(g)[h * kColumns + c] *= factor[c];
    for (int i = 0; i < kSlots; i += 2) {
      float *low = scores + i * kColumns, *high = low + kColumns;
      for (int c = 0; c < kColumns; c++) {
        low[c] = exp_of((low[c] - most[c]) * scale);
        high[c] = exp_of((high[c] - most[c]) * scale);
        total[c] += low[c] + high[c];
      }
      put_pair(weights_of(g) + i * kColumns, low, high);
    }
  }

  Sizes sizes_;
  int64_t count_;
  std::unique_ptr<Line[]> memory_;
};

template <typename Blocks, typename Query, typename Cache>
void attend(ffi::ThreadPool& pool, const void* query_data, const void* key_data, const void* value_data,
            const Visible& visible, void* y_data, const Sizes& sizes) {
  using Element = typename Blocks::Element;
  auto query = static_cast<const Query*>(query_data);
  auto key = static_cast<const Cache*>(key_data), value = static_cast<const Cache*>(value_data);
  auto y = static_cast<Query*>(y_data);
  const Span all(visible.begin, visible.end, sizes.rows * sizes.tokens, sizes.slots);
  const int64_t blocks = all.last - all.first, heads = sizes.rows * sizes.kv_heads, size = 2 * kSlots * sizes.width;
  auto memory = std::make_unique_for_overwrite<Line[]>(heads * blocks * size * sizeof(Element) / sizeof(Line));
  auto packed = reinterpret_cast<Element*>(memory.get());

  in_parts(pool, heads * blocks, [=](int64_t index) {
    int64_t slot = (all.first + index % blocks) * kSlots;
    int64_t from = (index / blocks * sizes.capacity + slot) * sizes.dim;
    pack(key + from, value + from, std::min<int64_t>(kSlots, sizes.slots - slot), sizes, packed + index * size);
  });

  const int64_t parts = (sizes.tokens + kColumns - 1) / kColumns;
  in_parts(pool, heads * parts, [=](int64_t index) {
    // The last tokens see most: they come first, so that no thread is left with them.
    const int64_t token = (parts - 1 - index / heads) * kColumns, head = index % heads;
    const int64_t row = head / sizes.kv_heads, kv_head = head % sizes.kv_heads, at = row * sizes.tokens + token;
    const int64_t count = std::min<int64_t>(kColumns, sizes.tokens - token);
    const int64_t first = (at * sizes.kv_heads + kv_head) * sizes.group * sizes.dim;
    const Visible own{visible.begin + at, visible.end + at, visible.segment + at,
                      visible.slot_segment + row * sizes.slots};
    const Span span(own.begin, own.end, count, sizes.slots);
    Queries<Blocks> queries(sizes, count);
    queries.take(query + first);
    Blocks::begin();
    for (int64_t block = span.first; block < span.last; block++)
      queries.attend(packed + (head * blocks + block - all.first) * size, own, block * kSlots);
    Blocks::end();
    queries.put(y + first);
  });
}

using Tokens = ffi::Buffer<ffi::S32, 2>;

// Whether the shapes and dtypes go together: query and y [B, T, N, H], key and value [B, K, C, H], begin, end and
// segment [B, T], slot_segment [B, S] with S at most C.
bool go_together(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value, Tokens begin, Tokens end,
                 Tokens segment, Tokens slot_segment, ffi::AnyBuffer y) {
  auto heads = query.dimensions(), cache = key.dimensions(), slots = slot_segment.dimensions();
  if (heads.size() != 4 || cache.size() != 4 || cache[1] == 0 || value.dimensions() != cache) return false;
  if (y.dimensions() != heads || y.element_type() != query.element_type() || value.element_type() != key.element_type())
    return false;
  for (Tokens of_tokens : {begin, end, segment})
    if (of_tokens.dimensions()[0] != heads[0] || of_tokens.dimensions()[1] != heads[1]) return false;
  return heads[0] == cache[0] && heads[2] % cache[1] == 0 && heads[3] == cache[3] && slots[0] == cache[0] &&
         slots[1] <= cache[2];
}

using Attend = decltype(&attend<VectorBlocks<Wide>, float, float>);

// For a query and a cache of these dtypes; null: there is none.
Attend choose(ffi::DataType query, ffi::DataType cache) {
#if defined(__AMX_TILE__)
  using Narrow = TileBlocks;
#elif defined(__AVX512BF16__)
  using Narrow = VectorBlocks<Pairs>;
#else
  using Narrow = VectorBlocks<Wide>;
#endif
  const bool is_narrow = cache == ffi::BF16;
  if (!is_narrow && cache != ffi::F32) return nullptr;
  if (query == ffi::F32)
    return is_narrow ? attend<VectorBlocks<Wide>, float, bfloat16> : attend<VectorBlocks<Wide>, float, float>;
  if (query == ffi::BF16) return is_narrow ? attend<Narrow, bfloat16, bfloat16> : attend<Narrow, bfloat16, float>;
  return nullptr;
}

ffi::Error prefill_attention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                             Tokens begin, Tokens end, Tokens segment, Tokens slot_segment,
                             ffi::Result<ffi::AnyBuffer> y) {
  Attend attend = choose(query.element_type(), key.element_type());
  if (attend == nullptr || !go_together(query, key, value, begin, end, segment, slot_segment, *y))
    return ffi::Error::InvalidArgument("prefill_attention: shapes or dtypes that do not go together");
  auto heads = query.dimensions(), cache = key.dimensions();
  const Sizes sizes{heads[0], heads[1], cache[1], heads[2] / cache[1], cache[2], slot_segment.dimensions()[1],
                    heads[3], (heads[3] + kRows - 1) / kRows * kRows};
  if (query.element_count() == 0) return ffi::Error::Success();
  attend(pool, query.untyped_data(), key.untyped_data(), value.untyped_data(),
         Visible{begin.typed_data(), end.typed_data(), segment.typed_data(), slot_segment.typed_data()},
         y->untyped_data(), sizes);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrefillAttention, prefill_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Tokens>()
                                  .Arg<Tokens>()
                                  .Arg<Tokens>()
                                  .Arg<Tokens>()
                                  .Ret<ffi::AnyBuffer>());
