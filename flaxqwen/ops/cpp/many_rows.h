// Products of many rows by AMX: y [rows, out] = x [rows, in] weight [out, in]^T.
//
// They wait for tiles from a core's second cache: to load one takes twice as long as to multiply it. So kRows rows of
// the weight are taken, kStepsAtOnce tiles of each at a time, which stay in the first cache while they are multiplied
// with all rows of x that a core has; sums wait in the second. Two cores reach 2.1 TFLOP/s of bfloat16 (Granite
// Rapids), by tiles.h, which takes whole rows of the weight, 1.6, and by XLA 1.1; their units do 7.
//
// float32 is multiplied as three numbers of bfloat16 each: 24 bits, in 6 products of parts, as XLA's BF16_BF16_F32_X6
// does on TPUs (Henry, Tang and Heinecke 2019). Errors are 0.4 of those of XLA's products of float32; 1,024 tokens
// through 0.5B take 3.0 s, by XLA's 3.5. A weight of int8 is widened to bfloat16, which is exact.
//
// Each result is the same sum in the same order whatever rows there are; of bfloat16 it is that of tiles.h.

#pragma once

#include "blocks.h"

#ifdef __AMX_TILE__

// Outputs at a time.
constexpr int64_t kOutputsAtOnce = 224;
// About, where there are as many blocks of outputs.
constexpr int64_t kPartsOfThread = 8;
// Elements of bfloat16 in a row of a tile.
constexpr int64_t kStep = kTileBytes / sizeof(bfloat16);

template <typename Weight, typename Element, typename Result>
class ManyRows {
  // Parts of a number of the weight, and of x.
  static constexpr int kWeightParts = kPartsOf<Weight>, kParts = kPartsOf<Element>;
  // Rows of x, and tiles of a row of the weight, at a time: 16 or 24 KB of the weight, and 229 or 458 KB of sums.
  // Weights in parts take time to make: more rows.
  static constexpr int64_t kRowsAtOnce = kWeightParts > 1 ? 512 : 256, kStepsAtOnce = kWeightParts > 1 ? 4 : 8;
  static constexpr int64_t kBlocks = kRowsAtOnce / kColumns, kStride = kStepsAtOnce * kStep;

 public:
  // Of the copy that fill() makes.
  static int64_t bytes(int64_t rows, int64_t in) {
    return (rows + kColumns - 1) / kColumns * kColumns * kParts * in * int64_t{sizeof(bfloat16)};
  }

  ManyRows(const Element* x, const Weight* weight, Result* y, Shape shape, Line* lines, int64_t threads)
      : x_(x),
        weight_(weight),
        y_(y),
        shape_(shape),
        steps_(shape.in / kStep),
        blocks_((shape.rows + kColumns - 1) / kColumns),
        groups_((shape.rows + kRowsAtOnce - 1) / kRowsAtOnce),
        outputs_(outputs_of_part(threads)),
        lines_(lines) {}

  int64_t blocks() const { return blocks_; }
  int64_t parts() const { return groups_ * ((shape_.out + outputs_ - 1) / outputs_); }

  // Writes kColumns rows of x as b of blocks.h, part after part. What is beyond the last row is 0.
  void fill(int64_t block) const {
    const int64_t row = block * kColumns;
    for (int64_t step = 0; step < steps_; step++)
      for (int half = 0; half < kColumns; half += kHalf) {
        __m512i words[kParts][kHalf] = {};
        for (int64_t i = 0; i < std::min<int64_t>(kHalf, shape_.rows - row - half); i++) {
          __m512i parts[kParts];
          split(x_ + (row + half + i) * shape_.in + step * kStep, parts);
          for (int part = 0; part < kParts; part++) words[part][i] = parts[part];
        }
        for (int part = 0; part < kParts; part++) {
          transpose(words[part]);
          bfloat16* to = words_at(block, step) + part * shape_.in * kColumns + 2 * half;
          for (int i = 0; i < kHalf; i++) _mm512_store_si512(to + 2 * i * kColumns, words[part][i]);
        }
      }
  }

  // Of kRowsAtOnce rows, and of outputs that stand beside each other: parts of the same outputs follow each other.
  void multiply(int64_t part) const {
    const int64_t block = part % groups_ * kBlocks, begin = part / groups_ * outputs_;
    const int64_t blocks = std::min(kBlocks, blocks_ - block);
    const int64_t end = std::min(begin + outputs_, shape_.out), chunks = (steps_ + kStepsAtOnce - 1) / kStepsAtOnce;
    auto memory = std::make_unique_for_overwrite<Line[]>(kRowsAtOnce * kOutputsAtOnce / 16);
    auto sums = reinterpret_cast<float*>(memory.get());
    Line panel[kWeightParts * kRows * kStepsAtOnce];
    TileBlocks::begin();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t step = steps_ * chunk / chunks, steps = steps_ * (chunk + 1) / chunks - step;
      for (int64_t output = begin; output < end; output += kRows) {
        const Weight* weight = weight_ + output * shape_.in + step * kStep;
        const int64_t outputs = std::min<int64_t>(kRows, end - output);
        const Weight* next = output + kRows < end ? weight + kRows * shape_.in
                                                 : weight_ + begin * shape_.in + (step + steps) * kStep;
        int64_t stride = shape_.in;
        const bfloat16* rows = rows_of(weight, outputs, steps, reinterpret_cast<bfloat16*>(panel), &stride);
        for (int64_t i = 0; i < blocks; i++) {
          float* to = sums + ((output - begin) / kRows * blocks + i) * kRows * kColumns;
          ask_for(next, kRows * i / blocks, kRows * (i + 1) / blocks, steps);
          multiply_block(to, rows, stride, words_at(block + i, step), steps, chunk > 0);
        }
      }
    }
    TileBlocks::end();
    // Row after row: lines of y that follow each other.
    for (int64_t i = 0; i < blocks; i++)
      for (int half = 0; half < kColumns; half += kHalf)
        for (int64_t output = begin; output < end; output += kRows) {
          const float* from = sums + ((output - begin) / kRows * blocks + i) * kRows * kColumns + half;
          const int64_t row = (block + i) * kColumns + half;
          put_rows(from, y_ + row * shape_.out + output, shape_.out, shape_.rows - row, end - output);
        }
  }

 private:
  // So that there are some parts for each thread: one that comes late then leaves little to wait for.
  int64_t outputs_of_part(int64_t threads) const {
    const int64_t outputs = shape_.out * groups_ / (kPartsOfThread * std::max<int64_t>(threads, 1));
    return std::clamp<int64_t>((outputs + kRows - 1) / kRows * kRows, kRows, kOutputsAtOnce);
  }

  // Numbers in parts have 6 products to a sum: those of a chunk are summed by themselves, which takes off two thirds of
  // the error of a sum of 4,864.
  void multiply_block(float* to, const bfloat16* rows, int64_t stride, const bfloat16* x, int64_t steps,
                      bool is_more) const {
    constexpr bool is_apart = kWeightParts > 1;
    alignas(kCacheLine) float own[is_apart ? kRows * kColumns : 1];
    auto product = is_more && !is_apart ? &TileBlocks::multiply<true, kWeightParts, kParts>
                                        : &TileBlocks::multiply<false, kWeightParts, kParts>;
    product(is_more && is_apart ? own : to, rows, stride, x, kRows, steps * kTile, kRows * kStride,
            shape_.in * kColumns);
    if (is_more && is_apart)
      for (int i = 0; i < kRows * kColumns; i++) to[i] += own[i];
  }

  bfloat16* words_at(int64_t block, int64_t step) const {
    return reinterpret_cast<bfloat16*>(lines_) + (block * kParts * shape_.in + step * kStep) * kColumns;
  }

  // Rows of the weight that come next: to widen 16 rows' weights of float32 then takes half the time.
  void ask_for(const Weight* weight, int64_t begin, int64_t end, int64_t steps) const {
    for (int64_t row = begin; row < end; row++)
      for (int64_t byte = 0; byte < steps * kStep * int64_t{sizeof(Weight)}; byte += kCacheLine)
        __builtin_prefetch(as<char>(weight + row * shape_.in) + byte, 0, 2);
  }

  // kRows rows of the weight, as they are; or in parts, and with zeros for those that there are not, in the panel.
  const bfloat16* rows_of(const Weight* weight, int64_t outputs, int64_t steps, bfloat16* panel,
                          int64_t* stride) const {
    if constexpr (std::is_same_v<Weight, bfloat16>)
      if (outputs == kRows) return weight;
    *stride = kStride;
    for (int64_t row = 0; row < kRows; row++)
      for (int64_t step = 0; step < steps; step++) {
        __m512i parts[kWeightParts] = {};
        if (row < outputs) split(weight + row * shape_.in + step * kStep, parts);
        for (int part = 0; part < kWeightParts; part++)
          _mm512_store_si512(panel + (part * kRows + row) * kStride + step * kStep, parts[part]);
      }
    return panel;
  }

  const Element* x_;
  const Weight* weight_;
  Result* y_;
  Shape shape_;
  // steps_: tiles of a row; blocks_: of kColumns rows; groups_: of kRowsAtOnce; outputs_: of a part.
  int64_t steps_, blocks_, groups_, outputs_;
  Line* lines_;  // [blocks, parts, steps, kColumns]
};

#endif
