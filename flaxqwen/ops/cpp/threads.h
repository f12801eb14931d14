// Work on several threads: those of XLA's pool, which stay for a while when they are done.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

constexpr int kCacheLine = 64;
// How often a thread that is done looks whether the others are, some 0.5 ms, before it sleeps: to be woken takes longer
// than most of them have left (8 rows, Zen 5: 15% of a product).
constexpr int kTurns = 20000;
// How often one that has nothing to do looks for more: from one product of a decoding step to the next there are 2 to
// 30 us, and a thread that sleeps comes up to 50 late on a virtual machine (k of 0.5B: 17 us in place of 35). It gives
// way to others now and then: the operations of XLA's between the products have threads, too.
constexpr int kLingeringTurns = 3000, kTurnsToYield = 16;

using Task = std::function<void()>;

// Where a thread lingers, and what it is given.
struct alignas(kCacheLine) Seat {
  enum State { kEmpty, kWaiting, kTaken, kReady };
  std::atomic<State> state{kEmpty};
  Task task;
};

class Lingering {
 public:
  // Whether a thread that lingers takes the task.
  static bool take(const Task& task) {
    for (Seat& seat : seats_)
      if (change(seat, Seat::kWaiting, Seat::kTaken)) {
        seat.task = task;
        seat.state = Seat::kReady;
        return true;
      }
    return false;
  }

  // This thread runs what it is given until nothing has come for a while; not if as many as `most` linger already, so
  // that XLA finds some in the pool.
  static void linger(int64_t most) {
    for (Seat& seat : seats_) {
      if (most-- <= 0) return;
      if (!change(seat, Seat::kEmpty, Seat::kWaiting)) continue;
      while (has_task(seat)) {
        std::exchange(seat.task, nullptr)();
        seat.state = Seat::kWaiting;
      }
      return;
    }
  }

 private:
  // From one state to another, which one thread alone succeeds in.
  static bool change(Seat& seat, Seat::State from, Seat::State to) {
    return seat.state == from && seat.state.compare_exchange_strong(from, to);
  }

  // Whether there is a task, after a while; if there is none, the seat is empty.
  static bool has_task(Seat& seat) {
    for (int turn = 0; turn < kLingeringTurns || !change(seat, Seat::kWaiting, Seat::kEmpty); turn++) {
      if (seat.state == Seat::kReady) return true;
      if (turn % kTurnsToYield == 0) std::this_thread::yield();
      _mm_pause();
    }
    return false;
  }

  static inline std::array<Seat, 64> seats_;
};

// Calls run(part) once for each of a number of parts, on the pool's threads and on this one, which takes what no other
// has begun: it never waits for a thread that is not there. A thread that comes late finds nothing to run.
template <typename Run>
void in_parts(ffi::ThreadPool& pool, int64_t parts, Run run) {
  struct Progress {
    alignas(kCacheLine) std::atomic<int64_t> begun{0};
    alignas(kCacheLine) std::atomic<int64_t> left;
  };
  auto progress = std::make_shared<Progress>();
  progress->left = parts;
  auto work = [=] {
    for (int64_t part; (part = progress->begun++) < parts;) {
      run(part);
      if (--progress->left == 0) progress->left.notify_one();
    }
  };
  const int64_t others = pool.num_threads() - 1;
  for (int64_t thread = 0; thread < std::min(parts - 1, others); thread++)
    if (!Lingering::take(work))
      pool.Schedule([=] {
        work();
        Lingering::linger(others);
      });
  work();
  for (int turn = 0; turn < kTurns && progress->left != 0; turn++) _mm_pause();
  for (int64_t left; (left = progress->left) != 0;) progress->left.wait(left);
}
