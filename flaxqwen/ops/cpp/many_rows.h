// Products of many rows of bfloat16 by AMX: y [rows, out] = x [rows, in] weight [out, in]^T.
//
// They wait for tiles from a core's second cache: to load one takes twice as long as to multiply it. So kRows rows of
// the weight are taken, kStepsAtOnce tiles of each at a time, which stay in the first cache while they are multiplied
// with all rows of x that a core has; sums wait in the second. Two cores reach 2.1 TFLOP/s (Granite Rapids), by
// tiles.h, which takes whole rows of the weight, 1.6, and by XLA 1.1; their units do 7. To ask for memory ahead does
// not help here.
//
// A weight of int8 is widened to bfloat16, which is exact, as it is taken. Each result is the same sum in the same
// order whatever rows there are, and of bfloat16 that of tiles.h.

#pragma once

#include "blocks.h"

#ifdef __AMX_TILE__

// Rows of x, outputs, and tiles of each row of the weight, at a time: 229 KB of sums, and 16 KB of the weight.
constexpr int64_t kRowsAtOnce = 256, kOutputsAtOnce = 224, kStepsAtOnce = 8;
// At least, where there are as many blocks of outputs.
constexpr int64_t kPartsOfThread = 8;
// Elements of bfloat16 in a row of a tile.
constexpr int64_t kStep = kTileBytes / sizeof(bfloat16);

template <typename Weight, typename Result>
class ManyRows {
 public:
  static bool take(int64_t in) { return in > 0 && in % kStep == 0; }

  ManyRows(const bfloat16* x, const Weight* weight, Result* y, Shape shape, int64_t threads)
      : x_(x),
        weight_(weight),
        y_(y),
        shape_(shape),
        steps_(shape.in / kStep),
        blocks_((shape.rows + kColumns - 1) / kColumns),
        groups_((shape.rows + kRowsAtOnce - 1) / kRowsAtOnce),
        outputs_(outputs_of_part(threads)),
        lines_(std::make_unique_for_overwrite<Line[]>(blocks_ * steps_ * kColumns)) {}

  int64_t blocks() const { return blocks_; }
  int64_t parts() const { return groups_ * ((shape_.out + outputs_ - 1) / outputs_); }

  // Writes kColumns rows of x as b of blocks.h.
  void fill(int64_t block) const {
    const int64_t row = block * kColumns;
    put_columns(x_ + row * shape_.in, shape_.in, shape_.rows - row, shape_.in, words_at(block));
  }

  // Of kRowsAtOnce rows, and of outputs that stand beside each other: parts of the same outputs follow each other.
  void multiply(int64_t part) const {
    const int64_t block = part % groups_ * (kRowsAtOnce / kColumns), begin = part / groups_ * outputs_;
    const int64_t blocks = std::min(kRowsAtOnce / kColumns, blocks_ - block);
    const int64_t end = std::min(begin + outputs_, shape_.out), chunks = (steps_ + kStepsAtOnce - 1) / kStepsAtOnce;
    auto memory = std::make_unique_for_overwrite<Line[]>(kRowsAtOnce * kOutputsAtOnce / 16);
    auto sums = reinterpret_cast<float*>(memory.get());
    Line panel[kRows * kStepsAtOnce];
    TileBlocks::begin();
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t step = steps_ * chunk / chunks, steps = steps_ * (chunk + 1) / chunks - step;
      for (int64_t output = begin; output < end; output += kRows) {
        const Weight* weight = weight_ + output * shape_.in + step * kStep;
        const int64_t outputs = std::min<int64_t>(kRows, end - output);
        int64_t stride = shape_.in;
        const bfloat16* rows = rows_of(weight, outputs, steps, reinterpret_cast<bfloat16*>(panel), &stride);
        for (int64_t i = 0; i < blocks; i++) {
          float* to = sums + ((output - begin) / kRows * blocks + i) * kRows * kColumns;
          const bfloat16* x = words_at(block + i) + step * kStep * kColumns;
          auto product = chunk == 0 ? &TileBlocks::multiply<false> : &TileBlocks::multiply<true>;
          product(to, rows, stride, x, kRows, steps * kTile);
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

  bfloat16* words_at(int64_t block) const {
    return reinterpret_cast<bfloat16*>(lines_.get()) + block * shape_.in * kColumns;
  }

  // kRows rows of the weight, as they are; or widened, and with zeros for those that there are not, in the panel.
  const bfloat16* rows_of(const Weight* weight, int64_t outputs, int64_t steps, bfloat16* panel,
                          int64_t* stride) const {
    if constexpr (std::is_same_v<Weight, bfloat16>)
      if (outputs == kRows) return weight;
    *stride = kStepsAtOnce * kStep;
    for (int64_t row = 0; row < kRows; row++)
      for (int64_t step = 0; step < steps; step++) {
        const Weight* from = weight + row * shape_.in + step * kStep;
        auto to = panel + row * *stride + step * kStep;
        _mm512_store_si512(to, row < outputs ? (__m512i)Pairs::load(from) : _mm512_setzero_si512());
      }
    return panel;
  }

  const bfloat16* x_;
  const Weight* weight_;
  Result* y_;
  Shape shape_;
  // steps_: tiles of a row; blocks_: of kColumns rows; groups_: of kRowsAtOnce; outputs_: of a part.
  int64_t steps_, blocks_, groups_, outputs_;
  std::unique_ptr<Line[]> lines_;  // [blocks, steps, kColumns]
};

#endif
